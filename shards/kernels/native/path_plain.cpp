// The inner loops for any machine.
#define FN inline __attribute__((always_inline))
#define ENTRY

#include "vec_plain.h"

#include "attend.h"
#include "tiles.h"

namespace kernels {

const Path* plain_path() {
    static const Path path = {dots<Widened<float>>,
                              dots<Widened<bf16>>,
                              take_queries<WidenedKeys<float>>,
                              take_queries<WidenedKeys<bf16>>,
                              attend<WidenedKeys<float>>,
                              attend<WidenedKeys<bf16>>,
                              delta};
    return &path;
}

}  // namespace kernels
