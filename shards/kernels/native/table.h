// The table of a path, from its operands: Kind of a product of bfloat16, Keys of attention over bfloat16.
// Included by each path_*.cpp after its vec_*.h.
#pragma once

#include "attend.h"
#include "ints.h"
#include "rows.h"

namespace kernels {
namespace {

template <class Kind, class Keys>
Path make_path() {
    using SingleKeys = WidenedKeys<float>;
    static const RowLoops<float> rows_f32 = row_loops<float>();
    static const RowLoops<bf16> rows_bf16 = row_loops<bf16>();
    return {take_queries<SingleKeys>, take_queries<Keys>, attend<SingleKeys>, attend<Keys>, merge, &rows_f32,
            &rows_bf16, unit, best, delta<float>, delta<bf16>, strip_matmul<Widened<float>>(), strip_matmul<Kind>(),
            int_matmul<Widened<float>>(), int_matmul<Kind>(), finish<float>,
            finish<bf16>, nullptr};
}

}  // namespace
}  // namespace kernels
