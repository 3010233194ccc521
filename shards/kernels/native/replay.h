// Lets a function of the library be called from numbers that were written down: see replay.cpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace replay {

// An argument out of its number: pointers and integers as they are, a float by its bits.
template <class A>
A argument(int64_t number) {
    if constexpr (std::is_pointer_v<A>) {
        return reinterpret_cast<A>(number);
    } else if constexpr (std::is_same_v<A, float>) {
        uint32_t bits = uint32_t(number);
        float value;
        std::memcpy(&value, &bits, sizeof(value));
        return value;
    } else {
        static_assert(std::is_integral_v<A>, "no such argument can be written down");
        return A(number);
    }
}

template <auto F>
struct Call;

template <class R, class... A, R (*F)(A...)>
struct Call<F> {
    template <size_t... I>
    static int run(const int64_t* numbers, std::index_sequence<I...>) {
        if constexpr (std::is_void_v<R>) {
            F(argument<A>(numbers[I])...);
            return 0;
        } else {
            return int(F(argument<A>(numbers[I])...));
        }
    }
    static int run(const int64_t* numbers) { return run(numbers, std::index_sequence_for<A...>()); }
};

}  // namespace replay

// Behind the definition of `function`: makes function_replay, which takes its arguments as numbers. What it returns is 0
// for success.
#define KERNELS_REPLAY(function)                                                                                  \
    extern "C" __attribute__((visibility("default"))) int function##_replay(const int64_t* numbers) {            \
        return replay::Call<&function>::run(numbers);                                                             \
    }
