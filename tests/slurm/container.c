/* A stand-in for pyxis: the options that launch/stage.sbatch gives, as srun takes them from a SPANK plugin, and a view
 * of the files in which /tmp has nothing but --container-mounts. The rest of the image is the node itself. */
#define _GNU_SOURCE
#include <sched.h>
#include <slurm/spank.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

SPANK_PLUGIN(container, 1)

static char image[4096], mounts[4096], first[4096];
static int without_home;

static int take_image(int value, const char *text, int remote) { snprintf(image, sizeof image, "%s", text); return 0; }
static int take_mounts(int value, const char *text, int remote) { snprintf(mounts, sizeof mounts, "%s", text); return 0; }
static int take_home(int value, const char *text, int remote) { without_home = 1; return 0; }

struct spank_option spank_options[] = {
    {"container-image", "IMAGE", "a file", 1, 0, take_image},
    {"container-mounts", "FROM:TO[,FROM:TO...]", "folders", 1, 0, take_mounts},
    {"no-container-mount-home", NULL, "leave the home folder out", 0, 0, take_home},
    SPANK_OPTIONS_TABLE_END
};

static void make(const char *path) {
  char part[4096];
  snprintf(part, sizeof part, "%s", path);
  for (char *slash = strchr(part + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
    *slash = 0;
    mkdir(part, 0755);
    *slash = '/';
  }
  mkdir(part, 0755);
}

int slurm_spank_task_init_privileged(spank_t spank, int count, char **words) {
  char given[4096], aside[64], said[5000], *rest = NULL, *from[16], *to[16];
  int number = 0;
  if (!image[0]) return 0;
  snprintf(given, sizeof given, "%s", mounts);
  if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL)) return -1;
  make("/run/container");
  if (mount("none", "/run/container", "tmpfs", 0, NULL)) return -1;
  for (char *one = strtok_r(given, ",", &rest); one && number < 16; one = strtok_r(NULL, ",", &rest), number++) {
    from[number] = one;
    to[number] = strchr(one, ':');
    if (!to[number]) return -1;
    *to[number]++ = 0;
    snprintf(aside, sizeof aside, "/run/container/%d", number);
    make(aside);
    if (mount(from[number], aside, NULL, MS_BIND | MS_REC, NULL)) return -1;
  }
  if (mount("none", "/tmp", "tmpfs", 0, NULL)) return -1;
  for (int each = 0; each < number; each++) {
    snprintf(aside, sizeof aside, "/run/container/%d", each);
    make(to[each]);
    if (mount(aside, to[each], NULL, MS_BIND | MS_REC, NULL)) return -1;
  }
  snprintf(first, sizeof first, "%s", to[0]);
  snprintf(said, sizeof said, "%s/container.txt", first);
  FILE *file = fopen(said, "a");
  if (!file) return -1;
  fprintf(file, "%s %d %s\n", image, without_home, mounts);
  fclose(file);
  return chdir(first);
}
