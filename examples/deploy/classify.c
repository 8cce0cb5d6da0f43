/* Classifies an image with a network compiled by feather; nothing but the C library is needed.
 *
 *   feather compile RUN --name model -o build
 *   cc -O3 -ffp-contract=fast -mavx512f -mavx512vl -mavx512dq -mfma -Ibuild classify.c build/model.c -o classify
 *   ./classify image.ppm
 *
 * The image is a binary PPM (P6) with 8 bits per channel, of the network's size. The flags are those that the first
 * lines of model.c name for its target.
 */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>

#include "model.h"

#if MODEL_CHANNELS != 3 || MODEL_BATCH != 1
#error "this example is for one colour image at a time"
#endif

static _Alignas(64) unsigned char workspace[MODEL_WORKSPACE];
static float image[MODEL_INPUT], scores[MODEL_OUTPUT];

/* The next number of a PPM header; comments run from # to the end of their line. */
static int next_number(FILE *file)
{
    int c = fgetc(file), value = 0;
    while (c == '#' || isspace(c)) {
        if (c == '#')
            while (c != '\n' && c != EOF) c = fgetc(file);
        c = fgetc(file);
    }
    if (!isdigit(c)) return -1;
    for (; isdigit(c) && value < 100000; c = fgetc(file)) value = 10 * value + c - '0';
    return value;
}

static int read_image(const char *path)
{
    static const float mean[] = MODEL_MEAN, std[] = MODEL_STD;
    const int pixels = MODEL_HEIGHT * MODEL_WIDTH;
    FILE *file = fopen(path, "rb");
    if (!file) {
        fprintf(stderr, "%s cannot be read\n", path);
        return 0;
    }
    int good = fgetc(file) == 'P' && fgetc(file) == '6';
    good = good && next_number(file) == MODEL_WIDTH && next_number(file) == MODEL_HEIGHT && next_number(file) == 255;
    for (int i = 0; good && i < pixels; ++i)
        for (int c = 0; c < 3; ++c) {
            const int value = fgetc(file);
            if (value == EOF) good = 0;
            image[c * pixels + i] = ((float)value / 255.0f - mean[c]) / std[c];
        }
    fclose(file);
    if (!good) fprintf(stderr, "%s is no binary PPM of %d x %d pixels\n", path, MODEL_WIDTH, MODEL_HEIGHT);
    return good;
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: %s IMAGE.ppm\n", argv[0]);
        return 2;
    }
    if (!model_supported()) {
        fprintf(stderr, "this processor lacks the instructions that the network was compiled for\n");
        return 2;
    }
    if (!read_image(argv[1])) return 2;
    model_run(image, scores, workspace);
    for (int rank = 0; rank < 5 && rank < MODEL_OUTPUT; ++rank) {
        int best = 0;
        for (int i = 1; i < MODEL_OUTPUT; ++i)
            if (scores[i] > scores[best]) best = i;
        printf("class %d  score %.4f\n", best, (double)scores[best]);
        scores[best] = -1e30f;
    }
    return 0;
}
