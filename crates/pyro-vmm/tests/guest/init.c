// The guest of tests/guest.rs: loads its modules, says R on the port, and obeys requests of one letter.
// Anything else comes back as it was.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static char buffer[65536];

static void wait_a_little(void) {
    struct timespec millisecond = {0, 1000000};
    nanosleep(&millisecond, 0);
}

static void load_modules(void) {
    char path[256];
    FILE *list = fopen("/modules.list", "r");
    while (list && fgets(path, sizeof path, list)) {
        path[strcspn(path, "\n")] = 0;
        int file = open(path, O_RDONLY);
        syscall(SYS_finit_module, file, "", 0);
        close(file);
    }
}

// Reads the beginning of the first disk and writes the beginning of the second.
static int use_disks(char *answer, size_t size) {
    char text[8] = {0};
    int rootfs = open("/dev/vda", O_RDONLY), overlay = open("/dev/vdb", O_RDWR);
    int denied = open("/dev/vda", O_RDWR) < 0 || write(open("/dev/vda", O_RDWR), "x", 1) < 0;
    read(rootfs, text, 4);
    int written = write(overlay, "hello", 5), synced = fsync(overlay);
    return snprintf(answer, size, "%s %d %d %d", text, written, synced, denied);
}

static int fill_overlay(char *answer, size_t size) {
    int overlay = open("/dev/vdb", O_RDWR), error = 0;
    char *block = malloc(1 << 20);
    memset(block, 7, 1 << 20);
    for (int i = 0; i < 8 && !error; i++)
        if (write(overlay, block, 1 << 20) != 1 << 20) error = errno;
    if (!error && fsync(overlay)) error = errno;
    return snprintf(answer, size, "error %d", error);
}

static void flood_console(void) {
    char line[80];
    int console = open("/dev/ttyS0", O_WRONLY);
    memset(line, 'x', sizeof line);
    line[79] = '\n';
    for (int i = 0; i < 3000; i++) write(console, line, sizeof line);
}

int main(void) {
    mount("dev", "/dev", "devtmpfs", 0, 0);
    mount("proc", "/proc", "proc", 0, 0);
    load_modules();
    int port = -1;
    while ((port = open("/dev/vport0p1", O_RDWR)) < 0) wait_a_little();
    write(port, "R", 1);
    for (;;) {
        int count = read(port, buffer, sizeof buffer);
        if (count <= 0) {
            wait_a_little();
            continue;
        }
        switch (count == 1 ? buffer[0] : 0) {
        case 'Q': reboot(RB_POWER_OFF); break;
        case 'B': reboot(RB_AUTOBOOT); break;
        case 'P': write(open("/proc/sysrq-trigger", O_WRONLY), "c", 1); break;
        case 'D': count = use_disks(buffer, sizeof buffer); break;
        case 'W': count = fill_overlay(buffer, sizeof buffer); break;
        case 'F': flood_console(); break;
        case 'N': count = snprintf(buffer, sizeof buffer, "%ld", sysconf(_SC_NPROCESSORS_ONLN)); break;
        }
        write(port, buffer, count);
    }
}
