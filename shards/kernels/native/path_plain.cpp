// The inner loops for any machine.
#define FN inline __attribute__((always_inline))
#define ENTRY

#include "vec_plain.h"

#include "tiles.h"

namespace kernels {

const Path* plain_path() {
    static const Path path = {dots<Widened<float>>, dots<Widened<bf16>>, weigh<float>, weigh<bf16>, soften, delta};
    return &path;
}

}  // namespace kernels
