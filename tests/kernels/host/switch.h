// A fiber: a stack of its own and a place in a function where it goes on.
//
// switch_fiber() saves the registers that a call keeps and takes over those of the other fiber: on x86-64 a few
// instructions, elsewhere ucontext. Sanitizers are told: AddressSanitizer keeps a record of each stack, ThreadSanitizer
// of each thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#define TCW_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TCW_ASAN 1
#endif
#endif

#ifdef TCW_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(TCW_UCONTEXT)
#define TCW_UCONTEXT 1
#endif
#ifdef TCW_UCONTEXT
#include <ucontext.h>
#endif

namespace tcw_host {

struct Fiber {
#ifndef TCW_UCONTEXT
    void* stack_pointer;
#else
    ucontext_t context;
#endif
    const void* bottom;  // of its stack; for the fiber that the process began with, AddressSanitizer says it
    size_t size;
    void* fake;    // AddressSanitizer's own
    void* thread;  // ThreadSanitizer's own
};

#ifndef TCW_UCONTEXT
extern "C" void tcw_switch_stack(void** save, void* to);
asm(R"(
.text
.type tcw_switch_stack, @function
tcw_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size tcw_switch_stack, .-tcw_switch_stack
)");

// Make a fiber that will call `start`, which never returns.
static void prepare(Fiber& fiber, char* stack, size_t size, void (*start)()) {
    auto** top = reinterpret_cast<void**>(stack + size) - 8;  // six registers, the address, and one to align the call
    memset(top, 0, 8 * sizeof(void*));
    top[6] = reinterpret_cast<void*>(start);
    fiber.stack_pointer = top;
    fiber.bottom = stack;
    fiber.size = size;
}

static inline void jump(Fiber& from, Fiber& to) { tcw_switch_stack(&from.stack_pointer, to.stack_pointer); }
#else
static void prepare(Fiber& fiber, char* stack, size_t size, void (*start)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = size;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
    fiber.bottom = stack;
    fiber.size = size;
}

static inline void jump(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#endif

// A fiber's first words: `main` is the one that switched to it.
static inline void arrived(Fiber& self, Fiber& main) {
    (void)self, (void)main;
#ifdef TCW_ASAN
    if (&self == &main) {
        __sanitizer_finish_switch_fiber(self.fake, nullptr, nullptr);
    } else {
        __sanitizer_finish_switch_fiber(self.fake, &main.bottom, &main.size);
    }
#endif
}

// Go on with `to`; comes back when somebody switches to `from`. One of the two is `main`.
static inline void switch_fiber(Fiber& from, Fiber& to, Fiber& main) {
#ifdef TCW_ASAN
    __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.size);
#endif
#ifdef TCW_TSAN
    __tsan_switch_to_fiber(to.thread, __tsan_switch_to_fiber_no_sync);
#endif
    jump(from, to);
    arrived(from, main);
}

}  // namespace tcw_host
