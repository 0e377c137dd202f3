// Where a fiber goes on when it runs again, and the switch from one to another.
#pragma once

#include <ucontext.h>

#include <cstddef>

namespace simt {

constexpr size_t kStack = 64 * 1024;

#if defined(__x86_64__)
// Six registers and the stack pointer are all that a call must leave as it was: swapcontext does the same, and two system calls.
using Context = void*;
extern "C" void simt_switch(Context* from, Context to);
asm(R"(
.globl simt_switch
.hidden simt_switch
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
inline void switch_to(Context& from, Context& to) { simt_switch(&from, to); }
inline void start_context(Context& context, char* stack, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + kStack) - 2;  // as a call would leave it: 8 bytes off a multiple of 16
  top[0] = reinterpret_cast<void*>(entry);
  context = top - 6;
}
#else
using Context = ucontext_t;
inline void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
inline void start_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = kStack;
  makecontext(&context, entry, 0);
}
#endif

}  // namespace simt
