// A function with a stack of its own, which can be left in the middle and resumed. One runs at a
// time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

#ifdef __x86_64__
// Saves the registers that a call preserves on this stack and takes them from the other one. Ten
// times quicker than swapcontext, which asks the kernel for the signal mask.
__attribute__((naked, noinline)) static void switch_stack(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}
#endif

class Fibre {
 public:
  // Makes the fibre ready to run `function` from its beginning, whatever it was doing.
  void start(void (*function)()) {
    if (!stack_) stack_.reset(new char[SIZE]);
    function_ = function;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack_.get(), SIZE);
#endif
#ifdef __x86_64__
    auto top = reinterpret_cast<uintptr_t>(stack_.get() + SIZE) / 16 * 16;
    void* frame[8] = {};  // six registers, where to return to, and an end for stack walkers
    frame[6] = reinterpret_cast<void*>(&entry);
    context_ = reinterpret_cast<void*>(top - sizeof frame);
    std::memcpy(context_, frame, sizeof frame);
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = SIZE;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // Called outside: runs the fibre until it leaves.
  void resume() {
    running() = this;
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_.get(), SIZE);
#endif
    swap(outside(), context_);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  // Called inside: goes back to whoever resumed it.
  void leave() { leave(false); }

 private:
  static constexpr size_t SIZE = 256 * 1024;
#ifdef __x86_64__
  using Context = void*;
  static void swap(Context& from, Context& to) { switch_stack(&from, to); }
#else
  using Context = ucontext_t;
  static void swap(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

  static Fibre*& running() {
    static Fibre* fibre = nullptr;
    return fibre;
  }
  static Context& outside() {
    static Context context{};
    return context;
  }

  static void entry() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &outside_stack_, &outside_size_);
#endif
    running()->function_();
    running()->leave(true);
  }

  void leave(bool for_good) {
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, outside_stack_, outside_size_);
#endif
    (void)for_good;
    swap(context_, outside());
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, &outside_stack_, &outside_size_);
#endif
  }

  std::unique_ptr<char[]> stack_;
  Context context_{};
  void (*function_)() = nullptr;
  inline static const void* outside_stack_ = nullptr;
  inline static size_t outside_size_ = 0;
};

}  // namespace cuda_on_cpu
