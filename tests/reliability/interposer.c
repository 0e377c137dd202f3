// Ends a process, or makes its disk fail, at the n-th system call that changes something below a folder.
//
// arm() begins the count. It has the kernel send a signal instead of every call of a table that may change a file (seccomp),
// whoever makes it: Rust's libraries go past the C library, where LD_PRELOAD would not see them. io_uring has no calls, and goes
// past it. The handler counts, kills or fails, and otherwise makes the call itself, from the one page whose calls the kernel lets
// through. What was done it writes into a journal, from which disk.py works out what a loss of power leaves. Before a file loses
// its name it gets another one elsewhere, so that its bytes can be put back.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/fs.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <ucontext.h>

enum mode { COUNT, KILL, FULL, BROKEN, READ_ONLY, INTERRUPTED, SHORT };  // class Fault of interposed.py

static char root[PATH_MAX], kept[PATH_MAX];
static long journal = -1, at, calls;
static int mode;

__attribute__((noinline, aligned(4096))) static long raw(long number, long a, long b, long c, long d, long e, long f) {
#if defined(__x86_64__)
  register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
  long result;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                   : "rcx", "r11", "memory");
  return result;
#elif defined(__aarch64__)
  register long x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c, x3 __asm__("x3") = d,
                   x4 __asm__("x4") = e, x5 __asm__("x5") = f;
  __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
  return x0;
#endif
}
__attribute__((noinline, aligned(4096))) static void end_of_raw(void) { __asm__ volatile(""); }

// What a call does to a disk. GROWS: takes space. WAITS: may be interrupted. WRITES: may write less than it was given.
enum { GROWS = 1, WAITS = 2, WRITES = 4 };

// Where a call's arguments are: folder and name, open file, second folder and name. -1: it has none; HERE: relative to the current
// folder.
enum { NONE = -1, HERE = -2 };
struct call {
  long number;
  const char* name;  // in the journal; NULL: nothing that disk.py follows
  int kind;
  signed char folder, path, file, to_folder, to;
};

static const struct call table[] = {
#ifdef SYS_open
    {SYS_open, "open", GROWS | WAITS, HERE, 0, NONE, NONE, NONE},
    {SYS_creat, "open", GROWS | WAITS, HERE, 0, NONE, NONE, NONE},
    {SYS_mkdir, "mkdir", GROWS, HERE, 0, NONE, NONE, NONE},
    {SYS_rmdir, "rmdir", 0, HERE, 0, NONE, NONE, NONE},
    {SYS_unlink, "remove", 0, HERE, 0, NONE, NONE, NONE},
    {SYS_rename, "rename", 0, HERE, 0, NONE, HERE, 1},
    {SYS_link, "link", GROWS, HERE, 0, NONE, HERE, 1},
    {SYS_symlink, "symlink", GROWS, HERE, 1, NONE, NONE, NONE},
    {SYS_chmod, NULL, 0, HERE, 0, NONE, NONE, NONE},
    {SYS_chown, NULL, 0, HERE, 0, NONE, NONE, NONE},
    {SYS_lchown, NULL, 0, HERE, 0, NONE, NONE, NONE},
    {SYS_utimes, NULL, 0, HERE, 0, NONE, NONE, NONE},
    {SYS_mknod, "mknod", GROWS, HERE, 0, NONE, NONE, NONE},
#endif
    {SYS_openat, "open", GROWS | WAITS, 0, 1, NONE, NONE, NONE},
    {SYS_openat2, "open", GROWS | WAITS, 0, 1, NONE, NONE, NONE},
    {SYS_mkdirat, "mkdir", GROWS, 0, 1, NONE, NONE, NONE},
    {SYS_unlinkat, "remove", 0, 0, 1, NONE, NONE, NONE},
#ifdef SYS_renameat
    {SYS_renameat, "rename", 0, 0, 1, NONE, 2, 3},
#endif
    {SYS_renameat2, "rename", 0, 0, 1, NONE, 2, 3},
    {SYS_linkat, "link", GROWS, 0, 1, NONE, 2, 3},
    {SYS_symlinkat, "symlink", GROWS, 1, 2, NONE, NONE, NONE},
    {SYS_mknodat, "mknod", GROWS, 0, 1, NONE, NONE, NONE},
    {SYS_fchmodat, NULL, 0, 0, 1, NONE, NONE, NONE},
    {SYS_fchownat, NULL, 0, 0, 1, NONE, NONE, NONE},
    {SYS_utimensat, NULL, 0, 0, 1, NONE, NONE, NONE},
    {SYS_setxattr, NULL, GROWS, HERE, 0, NONE, NONE, NONE},
    {SYS_lsetxattr, NULL, GROWS, HERE, 0, NONE, NONE, NONE},
    {SYS_removexattr, NULL, 0, HERE, 0, NONE, NONE, NONE},
    {SYS_lremovexattr, NULL, 0, HERE, 0, NONE, NONE, NONE},
#ifdef SYS_fchmodat2
    {SYS_fchmodat2, NULL, 0, 0, 1, NONE, NONE, NONE},
#endif
    {SYS_truncate, "truncate", GROWS, HERE, 0, NONE, NONE, NONE},
    {SYS_write, "write", GROWS | WAITS | WRITES, NONE, NONE, 0, NONE, NONE},
    {SYS_pwrite64, "write", GROWS | WAITS | WRITES, NONE, NONE, 0, NONE, NONE},
    {SYS_writev, "write", GROWS | WAITS, NONE, NONE, 0, NONE, NONE},
    {SYS_pwritev, "write", GROWS | WAITS, NONE, NONE, 0, NONE, NONE},
    {SYS_pwritev2, "write", GROWS | WAITS, NONE, NONE, 0, NONE, NONE},
    {SYS_ftruncate, "truncate", GROWS | WAITS, NONE, NONE, 0, NONE, NONE},
    {SYS_fallocate, "write", GROWS | WAITS, NONE, NONE, 0, NONE, NONE},
    {SYS_sendfile, "write", GROWS | WAITS, NONE, NONE, 0, NONE, NONE},
    {SYS_copy_file_range, "write", GROWS | WAITS, NONE, NONE, 2, NONE, NONE},
    {SYS_splice, "write", GROWS | WAITS, NONE, NONE, 2, NONE, NONE},
    {SYS_mmap, "write", GROWS, NONE, NONE, 4, NONE, NONE},  // stores into it are no calls: they are never flushed
    {SYS_fsync, "flush", WAITS, NONE, NONE, 0, NONE, NONE},
    {SYS_fdatasync, "flush", WAITS, NONE, NONE, 0, NONE, NONE},
    {SYS_fchmod, NULL, 0, NONE, NONE, 0, NONE, NONE},
    {SYS_fchown, NULL, 0, NONE, NONE, 0, NONE, NONE},
    {SYS_fsetxattr, NULL, GROWS, NONE, NONE, 0, NONE, NONE},
    {SYS_fremovexattr, NULL, 0, NONE, NONE, 0, NONE, NONE},
    {SYS_ioctl, "write", GROWS, NONE, NONE, 0, NONE, NONE},  // of those only FICLONE, which copies
    {SYS_close, NULL, 0, NONE, NONE, 0, NONE, NONE},
};
enum { TABLE = sizeof table / sizeof *table };

// The path of an open file or folder.
static void path_of(long descriptor, char* out) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%ld", descriptor);
  long length = raw(SYS_readlinkat, AT_FDCWD, (long)link, (long)out, PATH_MAX - 1, 0, 0);
  out[length < 0 ? 0 : length] = 0;
}

static int inside(const char* path) {
  size_t length = strlen(root);
  return length && !strncmp(path, root, length) && (path[length] == 0 || path[length] == '/');
}

// The absolute path of a name relative to a folder; whether it is the root or below it.
static int resolve(long folder, const char* name, char* out) {
  char base[PATH_MAX] = "";
  if (name[0] != '/' && (int)folder != AT_FDCWD)
    path_of((int)folder, base);
  else if (name[0] != '/' && raw(SYS_getcwd, (long)base, sizeof base, 0, 0, 0, 0) < 0)
    base[0] = 0;
  if (snprintf(out, PATH_MAX, name[0] == '/' ? "%s%s" : "%s/%s", base, name) >= PATH_MAX) out[0] = 0;
  size_t length = strlen(out);
  while (length > 1 && out[length - 1] == '/') out[--length] = 0;
  return inside(out);
}

// The flags that a file is opened with, or -1 for a call that opens none.
static long flags_of(long number, const long* a) {
  switch (number) {
#ifdef SYS_open
    case SYS_open:
      return a[1];
    case SYS_creat:
      return O_WRONLY | O_CREAT | O_TRUNC;
#endif
    case SYS_openat:
      return a[2];
    case SYS_openat2:
      return (long)*(const uint64_t*)a[2];
  }
  return -1;
}

// Whether a call changes files at all, by its arguments.
static int changes(long number, const long* a) {
  long flags = flags_of(number, a);
  if (flags >= 0) return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
  if (number == SYS_mmap) return (int)a[4] >= 0 && a[2] & PROT_WRITE && a[3] & MAP_SHARED;
  if (number == SYS_ioctl) return (unsigned)a[1] == FICLONE;
  if (number == SYS_close) {
    long access = raw(SYS_fcntl, a[0], F_GETFL, 0, 0, 0, 0);
    return a[0] != journal && access >= 0 && (access & O_ACCMODE) != O_RDONLY;
  }
  return 1;
}

// A line of the journal: the call's number, its name and paths, separated by zeros.
static void record(long call, const char* name, const char* path, const char* other) {
  char line[2 * PATH_MAX + 64];
  int length = snprintf(line, sizeof line, "%ld%c%s%c%s%c%s\n", call, 0, name, 0, path, 0, other);
  raw(SYS_write, journal, (long)line, length, 0, 0, 0);
}

static long made(const struct call* call, long* a) {
  char path[PATH_MAX], other[PATH_MAX] = "";
  int counts = call->file != NONE
                   ? (path_of((int)a[(int)call->file], path), inside(path))
                   : resolve(call->folder == HERE ? AT_FDCWD : a[(int)call->folder], (const char*)a[(int)call->path], path);
  if (call->to != NONE)
    counts |= resolve(call->to_folder == HERE ? AT_FDCWD : a[(int)call->to_folder], (const char*)a[(int)call->to], other);
  if (!counts) return raw(call->number, a[0], a[1], a[2], a[3], a[4], a[5]);

  long number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
  int failing = mode != COUNT && number >= at && call->number != SYS_close;
  if (mode == KILL && number >= at) raw(SYS_kill, raw(SYS_getpid, 0, 0, 0, 0, 0, 0), SIGKILL, 0, 0, 0, 0);
  if (failing && mode == FULL && call->kind & GROWS) return -ENOSPC;
  if (failing && mode == BROKEN) return -EIO;
  if (failing && mode == READ_ONLY) return -EROFS;
  if (failing && mode == INTERRUPTED && call->kind & WAITS && (number - at) % 2 == 0) return -EINTR;
  if (failing && mode == SHORT && call->kind & WRITES) a[2] = (a[2] + 1) / 2;

  const char* name = call->name;
  long flags = flags_of(call->number, a);
  if (flags >= 0 && (flags & O_TMPFILE) == O_TMPFILE)
    name = NULL;
  else if (flags >= 0 && flags & O_TRUNC)
    name = "create";
  if (call->number == SYS_unlinkat && a[2] & AT_REMOVEDIR) name = "rmdir";
  if (call->number == SYS_renameat2 && a[4] & RENAME_EXCHANGE) name = "exchange";
  if (name && (!strcmp(name, "remove") || !strcmp(name, "rename"))) {
    char spare[PATH_MAX + 32];
    snprintf(spare, sizeof spare, "%s/%ld", kept, number);
    raw(SYS_linkat, AT_FDCWD, (long)(other[0] ? other : path), AT_FDCWD, (long)spare, 0, 0);
  }
  long result = raw(call->number, a[0], a[1], a[2], a[3], a[4], a[5]);
  struct stat status;
  if (name && !strcmp(name, "flush") && !raw(SYS_fstat, a[0], (long)&status, 0, 0, 0, 0))
    snprintf(other, sizeof other, "%lld", (long long)status.st_size);
  if (call->number == SYS_truncate || call->number == SYS_ftruncate) snprintf(other, sizeof other, "%ld", a[1]);
  if (name && (unsigned long)result < (unsigned long)-4095) record(number, name, path, other);
  return result;
}

static void on_call(int signal, siginfo_t* info, void* where) {
  (void)signal;
#if defined(__x86_64__)
  greg_t* r = ((ucontext_t*)where)->uc_mcontext.gregs;
  long a[] = {r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8], r[REG_R9]};
  greg_t* result = &r[REG_RAX];
#elif defined(__aarch64__)
  unsigned long long* r = ((ucontext_t*)where)->uc_mcontext.regs;
  long a[] = {r[0], r[1], r[2], r[3], r[4], r[5]};
  unsigned long long* result = &r[0];
#endif
  int error = errno;
  const struct call* call = table;
  while (call->number != info->si_syscall) call++;
  *result = root[0] && changes(call->number, a) ? made(call, a) : raw(call->number, a[0], a[1], a[2], a[3], a[4], a[5]);
  errno = error;
}

// Counts this process's calls below a folder from now on; returns 0, or what the kernel says if it cannot.
int arm(const char* folder, const char* journal_path, const char* kept_folder, long number, int what) {
  snprintf(root, sizeof root, "%s", folder);
  snprintf(kept, sizeof kept, "%s", kept_folder);
  journal = raw(SYS_openat, AT_FDCWD, (long)journal_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644, 0, 0);
  at = number, mode = what, calls = 0;
  struct sigaction action = {.sa_sigaction = on_call, .sa_flags = SA_SIGINFO};
  if (sigaction(SIGSYS, &action, NULL)) return errno;

  uint64_t page = (uint64_t)(uintptr_t)raw, end = (uint64_t)(uintptr_t)end_of_raw;
  struct sock_filter program[16 + TABLE];
  int n = 0;
  // Calls from the page pass. Its end lies in the same 4 GiB, or the two have different upper halves and nothing passes.
  program[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer) + 4);
  program[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(page >> 32), 0, 4);
  program[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer));
  program[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, (uint32_t)page, 0, 2);
  program[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, (uint32_t)end, 1, 0);
  program[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  program[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
  for (int i = 0; i < TABLE; i++)
    program[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)table[i].number, (uint8_t)(TABLE - i), 0);
  program[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  program[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
  struct sock_fprog filter = {.len = (unsigned short)n, .filter = program};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return errno;
  return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &filter) ? errno : 0;
}

// Ends the count and returns it.
long disarm(void) {
  root[0] = 0;
  return calls;
}
