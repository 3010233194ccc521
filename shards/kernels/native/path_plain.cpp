// The inner loops for any machine.
#define FN inline __attribute__((always_inline))
#define ENTRY

#include "vec_plain.h"

#include "table.h"

namespace kernels {

const Path* plain_path() {
    static const Path path = make_path<Widened<bf16>, WidenedKeys<bf16>>();
    return &path;
}

}  // namespace kernels
