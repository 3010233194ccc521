// The table of a path, from its operands: Kind of a product of bfloat16, Keys of attention over bfloat16.
// Included by each path_*.cpp after its vec_*.h.
#pragma once

#include "attend.h"
#include "lanes.h"

namespace kernels {
namespace {

template <class Kind, class Keys>
Path make_path() {
    using SingleKeys = WidenedKeys<float>;
    return {take_queries<SingleKeys>, take_queries<Keys>,  attend<SingleKeys>, attend<Keys>, delta,
            lane_matmul<Widened<float>>(), lane_matmul<Kind>(), finish<float>, finish<bf16>, mix<float>, mix<bf16>};
}

}  // namespace
}  // namespace kernels
