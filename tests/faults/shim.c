/* Preloaded into a job: counts the calls that change its output folder, and disturbs one of them.

   FAULTS_UNDER     the folder: calls on other paths are let through, uncounted
   FAULTS_STATE     file of 8 zeros: the number of calls so far, of all processes together
   FAULTS_LOG       file that gets a line per call: its number, name, bytes (of a write; of the file
                    at an fsync) and path
   FAULTS_HOW       kill: SIGKILL to the process group before the call
                    torn: write half of the bytes, then the same
                    short: write half of the bytes, if more than 256, and report so
                    lie: fsync and fdatasync report success and do nothing
                    a number: fail with this errno (a full disk fails no unlink)
                    count: nothing
   FAULTS_CALLS     names of the calls to count, a comma behind each; absent: all
   FAULTS_AT        which call, from 1; 0: each
   FAULTS_FOREVER   1: that call and each one after it
   FAULTS_DELAY_MS  how much longer a write of records takes */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static long *count;
static int log_fd = -1;
static const char *under, *how, *calls;
static long at, forever, delay_ms;

__attribute__((constructor)) static void begin(void) {
    const char *state = getenv("FAULTS_STATE"), *text;
    under = getenv("FAULTS_UNDER");
    how = getenv("FAULTS_HOW");
    calls = getenv("FAULTS_CALLS");
    at = (text = getenv("FAULTS_AT")) ? atol(text) : 0;
    forever = (text = getenv("FAULTS_FOREVER")) ? atol(text) : 0;
    delay_ms = (text = getenv("FAULTS_DELAY_MS")) ? atol(text) : 0;
    if (!state || !under || !how) return;
    int fd = syscall(SYS_openat, AT_FDCWD, state, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    void *mapped = mmap(NULL, sizeof *count, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped == MAP_FAILED) return;
    if ((text = getenv("FAULTS_LOG")))
        log_fd = syscall(SYS_openat, AT_FDCWD, text, O_WRONLY | O_APPEND | O_CLOEXEC);
    count = mapped;
}

/* The path of `name` relative to a folder's descriptor; without a name, that of the descriptor. */
static void locate(int fd, const char *name, char *path) {
    char link[64];
    ssize_t length = 0;
    if (!name || name[0] != '/') {
        if (fd == AT_FDCWD) strcpy(link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        length = readlink(link, path, PATH_MAX - 1);
        if (length < 0) length = 0;
        if (name) path[length++] = '/';
    }
    path[length] = 0;
    if (name) strncat(path, name, PATH_MAX - length - 1);
}

static void wait_as_a_slow_disk(const char *path) {
    struct timespec delay = {delay_ms / 1000, delay_ms % 1000 * 1000000};
    if (delay_ms && strstr(path, "/predictions")) nanosleep(&delay, NULL);
}

static int needs_no_space(const char *call) {
    return !strncmp(call, "unlink", 6) || !strcmp(call, "fchmod");
}

/* Whether this call is the one to disturb; killing, and setting errno, is done here. */
static int hit(const char *call, int fd, const char *name, long num_bytes) {
    char path[PATH_MAX + 1], line[PATH_MAX + 64];
    int before = errno;
    if (!count) return 0;
    snprintf(line, sizeof line, "%s,", call);
    if (calls && !strstr(calls, line)) return 0;
    locate(fd, name, path);
    if (strncmp(path, under, strlen(under))) return (errno = before, 0);
    if (!strcmp(call, "write")) wait_as_a_slow_disk(path);
    long number = __atomic_add_fetch(count, 1, __ATOMIC_SEQ_CST);
    if (log_fd >= 0) {
        int length = snprintf(line, sizeof line, "%ld %s %ld %s\n", number, call, num_bytes, path);
        syscall(SYS_write, log_fd, line, length);
    }
    errno = before;
    if (at && number != at && !(forever && number > at)) return 0;
    if ((atoi(how) == ENOSPC || atoi(how) == EDQUOT) && needs_no_space(call)) return 0;
    if (!strcmp(how, "kill")) kill(0, SIGKILL);
    if (atoi(how)) errno = atoi(how);
    return 1;
}

static int fails(int is_hit) { return is_hit && atoi(how); }

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t length) {
    int is_hit = hit("write", fd, NULL, length);
    if (fails(is_hit)) return -1;
    if (is_hit && !strcmp(how, "short") && length > 256) length /= 2;
    if (is_hit && !strcmp(how, "torn")) {
        syscall(SYS_write, fd, data, length / 2);
        kill(0, SIGKILL);
    }
    return syscall(SYS_write, fd, data, length);
}

#define SYNC(name)                                          \
    int name(int fd) {                                      \
        struct stat file = {0};                             \
        if (count) fstat(fd, &file);                        \
        int is_hit = hit(#name, fd, NULL, file.st_size);    \
        if (fails(is_hit)) return -1;                       \
        if (is_hit && !strcmp(how, "lie")) return 0;        \
        return REAL(name)(fd);                              \
    }
SYNC(fsync)
SYNC(fdatasync)

#define ON_DESCRIPTOR(name, ...)                            \
    if (fails(hit(#name, fd, NULL, 0))) return -1;             \
    return REAL(name)(__VA_ARGS__);
int ftruncate(int fd, off_t length) { ON_DESCRIPTOR(ftruncate, fd, length) }
int ftruncate64(int fd, off64_t length) { ON_DESCRIPTOR(ftruncate64, fd, length) }
int posix_fallocate(int fd, off_t from, off_t length) {
    if (fails(hit("posix_fallocate", fd, NULL, 0))) return errno;
    return REAL(posix_fallocate)(fd, from, length);
}
int fallocate(int fd, int mode, off_t from, off_t length) {
    ON_DESCRIPTOR(fallocate, fd, mode, from, length)
}
int fchmod(int fd, mode_t mode) { ON_DESCRIPTOR(fchmod, fd, mode) }

#define ON_NAME(call, fd, name, ...)                        \
    if (fails(hit(#call, fd, name, 0))) return -1;             \
    return REAL(call)(__VA_ARGS__);
int rename(const char *a, const char *b) { ON_NAME(rename, AT_FDCWD, b, a, b) }
int renameat(int from, const char *a, int to, const char *b) {
    ON_NAME(renameat, to, b, from, a, to, b)
}
int renameat2(int from, const char *a, int to, const char *b, unsigned flags) {
    ON_NAME(renameat2, to, b, from, a, to, b, flags)
}
int link(const char *a, const char *b) { ON_NAME(link, AT_FDCWD, b, a, b) }
int linkat(int from, const char *a, int to, const char *b, int flags) {
    ON_NAME(linkat, to, b, from, a, to, b, flags)
}
int unlink(const char *a) { ON_NAME(unlink, AT_FDCWD, a, a) }
int unlinkat(int fd, const char *a, int flags) { ON_NAME(unlinkat, fd, a, fd, a, flags) }
int truncate(const char *a, off_t length) { ON_NAME(truncate, AT_FDCWD, a, a, length) }
int truncate64(const char *a, off64_t length) { ON_NAME(truncate64, AT_FDCWD, a, a, length) }
int mkdir(const char *a, mode_t mode) { ON_NAME(mkdir, AT_FDCWD, a, a, mode) }

static int opened(int fd, const char *name, int flags, mode_t mode) {
    if ((flags & (O_CREAT | O_WRONLY | O_RDWR)) && fails(hit("open", fd, name, 0))) return -1;
    return syscall(SYS_openat, fd, name, flags, mode);
}

#define MODE(flags)                                         \
    mode_t mode = 0;                                        \
    va_list rest;                                           \
    va_start(rest, flags);                                  \
    if (flags & O_CREAT) mode = va_arg(rest, mode_t);       \
    va_end(rest);
int open(const char *a, int flags, ...) { MODE(flags) return opened(AT_FDCWD, a, flags, mode); }
int open64(const char *a, int flags, ...) { MODE(flags) return opened(AT_FDCWD, a, flags, mode); }
int openat(int fd, const char *a, int flags, ...) { MODE(flags) return opened(fd, a, flags, mode); }
int openat64(int fd, const char *a, int flags, ...) {
    MODE(flags) return opened(fd, a, flags, mode);
}
