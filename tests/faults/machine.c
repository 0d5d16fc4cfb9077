/* Preloaded into a job: as if it ran on another machine, on another file system, or a slow one.

   MACHINE_FLOCK    none: flock answers ENOSYS, as on some network file systems
                    own: it succeeds and locks nobody out, as among machines that share no locks
   MACHINE_NAME     what gethostname and uname say
   MACHINE_BOOT_ID  a file that is read instead of /proc/sys/kernel/random/boot_id
   MACHINE_SLOW     a folder or a list: to read its names takes longer; with a / at its end, to read
                    from files of that folder does instead
   MACHINE_SLOW_US  so many microseconds for each name, each 16 bytes of a list, or each read */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

int flock(int fd, int operation) {
    const char *how = getenv("MACHINE_FLOCK");
    if (how && !strcmp(how, "none")) return (errno = ENOSYS, -1);
    return how ? 0 : syscall(SYS_flock, fd, operation);
}

int gethostname(char *name, size_t length) {
    const char *given = getenv("MACHINE_NAME");
    if (!given) return REAL(gethostname)(name, length);
    if (strlen(given) >= length) return (errno = ENAMETOOLONG, -1);
    strcpy(name, given);
    return 0;
}

int uname(struct utsname *found) {
    const char *given = getenv("MACHINE_NAME");
    int result = syscall(SYS_uname, found);
    if (given) snprintf(found->nodename, sizeof found->nodename, "%s", given);
    return result;
}

static int opened(int fd, const char *name, int flags, mode_t mode) {
    const char *given = getenv("MACHINE_BOOT_ID");
    if (given && !strcmp(name, "/proc/sys/kernel/random/boot_id")) name = given;
    return syscall(SYS_openat, fd, name, flags, mode);
}

#define MODE(flags)                                         \
    mode_t mode = 0;                                        \
    va_list rest;                                           \
    va_start(rest, flags);                                  \
    if (flags & (O_CREAT | __O_TMPFILE)) mode = va_arg(rest, mode_t); \
    va_end(rest);
int open(const char *a, int flags, ...) { MODE(flags) return opened(AT_FDCWD, a, flags, mode); }
int open64(const char *a, int flags, ...) { MODE(flags) return opened(AT_FDCWD, a, flags, mode); }
int openat(int fd, const char *a, int flags, ...) { MODE(flags) return opened(fd, a, flags, mode); }
int openat64(int fd, const char *a, int flags, ...) {
    MODE(flags) return opened(fd, a, flags, mode);
}

static void wait_if_slow(int fd, long num_bytes) {
    const char *slow = getenv("MACHINE_SLOW"), *each = getenv("MACHINE_SLOW_US");
    char link[64], path[PATH_MAX + 1];
    int before = errno;
    if (!slow || !each || num_bytes <= 0) return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX);
    path[length > 0 ? length : 0] = 0;
    int is_folder = slow[strlen(slow) - 1] == '/';
    if (is_folder ? !strncmp(path, slow, strlen(slow)) : !strcmp(path, slow)) {
        long us = atol(each) * (is_folder ? 1 : (num_bytes + 15) / 16);
        struct timespec delay = {us / 1000000, us % 1000000 * 1000};
        nanosleep(&delay, NULL);
    }
    errno = before;
}

struct dirent *readdir(DIR *folder) {
    wait_if_slow(dirfd(folder), 1);
    return REAL(readdir)(folder);
}

struct dirent64 *readdir64(DIR *folder) {
    wait_if_slow(dirfd(folder), 1);
    return REAL(readdir64)(folder);
}

ssize_t read(int fd, void *data, size_t length) {
    ssize_t found = syscall(SYS_read, fd, data, length);
    wait_if_slow(fd, found);
    return found;
}
