/* Runs a generated network on a file of float32 images: harness COUNT INPUT OUTPUT. Compile with -DNAME=... */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

void PASTE(NAME, _run)(const float *input, float *output, void *workspace);

int main(int argc, char **argv)
{
    if (argc != 4) return 2;
    const long calls = atol(argv[1]);
    /* Exactly as much as is promised, so that a sanitizer sees every access beyond; filled with NaN. */
    float *input = malloc(sizeof(float) * INPUT), *output = malloc(sizeof(float) * OUTPUT);
    void *workspace = aligned_alloc(64, WORKSPACE);
    FILE *from = fopen(argv[2], "rb"), *to = fopen(argv[3], "wb");
    if (!input || !output || !workspace || !from || !to) return 3;
    memset(workspace, 0xff, WORKSPACE);
    for (long i = 0; i < calls; ++i) {
        if (fread(input, sizeof(float), INPUT, from) != INPUT) return 4;
        PASTE(NAME, _run)(input, output, workspace);
        if (fwrite(output, sizeof(float), OUTPUT, to) != OUTPUT) return 5;
    }
#ifdef PEAK /* the line "VmHWM: ... kB" of Linux: the largest resident set so far */
    FILE *status = fopen("/proc/self/status", "r");
    char line[128];
    while (status && fgets(line, sizeof line, status))
        if (!strncmp(line, "VmHWM", 5)) fputs(line, stdout);
#endif
    fclose(from);
    fclose(to);
    free(workspace);
    free(output);
    free(input);
    return 0;
}
