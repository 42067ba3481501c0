/* Preloaded into a process, shifts its time of day by the seconds that a file holds (a double, in the host's bytes).
 *
 * The file, named by TEST_CLOCK_FILE, is mapped once, so that writing to it steps the clock of running processes.  The
 * monotonic clock is left alone: no operator can step that one.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int (*plain)(clockid_t, struct timespec *);
static volatile double *offset;

__attribute__((constructor)) static void load(void)
{
    const char *path = getenv("TEST_CLOCK_FILE");
    int file = path ? open(path, O_RDONLY) : -1;
    plain = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    if (file < 0)
        return;
    void *map = mmap(NULL, sizeof(double), PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (map != MAP_FAILED)
        offset = map;
}

int clock_gettime(clockid_t id, struct timespec *at)
{
    if (!plain)
        load();
    int failed = plain(id, at);
    if (!failed && offset && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) {
        double whole = floor(*offset), rest = *offset - whole;
        at->tv_sec += (time_t)whole;
        at->tv_nsec += (long)(rest * 1e9);
        if (at->tv_nsec >= 1000000000L) {
            at->tv_nsec -= 1000000000L;
            at->tv_sec += 1;
        }
    }
    return failed;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone)
{
    struct timespec now;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &now))
        return -1;
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at)
        *at = now.tv_sec;
    return now.tv_sec;
}
