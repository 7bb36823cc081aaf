/* The Lion step of many tensors on a CPU, in five passes over memory: what kernels/lion_cpu.py calls.

   Bits are those of PyTorch's operations in float32: every product is rounded before it is used, but for the fused multiply-adds written
   as fmaf (compile with -ffp-contract=off). bfloat16 is rounded once, when stored. Compilers make vector instructions of the loops, if
   they may assume that comparisons do not trap. */

#include <math.h>
#include <stdint.h>

#if defined(__x86_64__) || defined(__i386__)
#define WITH_FMA __attribute__((target("avx2,fma"))) /* lion_cpu.py asks whether the processor has these */
#else
#define WITH_FMA
#endif

enum { ALONE = 32768 }; /* elements that one thread has stepped before others could begin */
enum { APART = 32 };    /* a thread has a multiple of so many, a cache line's: two seldom write to the same line */

struct factors {
    float grad, decay, rate, beta1, rest1, beta2, rest2;
};

/* ---- dtypes ---- */

typedef float float32;
typedef uint16_t bfloat16;

static inline float from_float32(float32 x) { return x; }
static inline float32 to_float32(float x) { return x; }

static inline float from_bfloat16(bfloat16 x) {
    union { uint32_t bits; float value; } wide = {(uint32_t)x << 16};
    return wide.value;
}

/* The nearest; of two the even one. */
static inline bfloat16 to_bfloat16(float x) {
    union { float value; uint32_t bits; } wide = {x};
    uint32_t half = 0x7FFF + (wide.bits >> 16 & 1);
    return x == x ? (wide.bits + half) >> 16 : 0x7FC0;
}

/* ---- the step of one tensor's elements, for every combination of dtypes ---- */

#define DEFINE_STEP(P, G, M)                                                                                \
    WITH_FMA static void step_##P##_##G##_##M(                                                              \
        void *params, const void *grads, void *momenta, int64_t start, int64_t end, struct factors f        \
    ) {                                                                                                     \
        P *param = params;                                                                                  \
        const G *grad = grads;                                                                              \
        M *momentum = momenta;                                                                              \
        for (int64_t i = start; i < end; i++) {                                                             \
            float g = from_##G(grad[i]) * f.grad, m = from_##M(momentum[i]);                                \
            float x = fmaf(g, f.rest1, f.beta1 * m);                                                        \
            float sign = x > 0 ? 1.0f : x < 0 ? -1.0f : x == 0 ? 0.0f : x; /* NaN where x is; never -0 */   \
            param[i] = to_##P(fmaf(sign, -f.rate, from_##P(param[i]) * f.decay));                           \
            momentum[i] = to_##M(fmaf(g, f.rest2, f.beta2 * m));                                            \
        }                                                                                                   \
    }

DEFINE_STEP(float32, float32, float32)
DEFINE_STEP(float32, float32, bfloat16)
DEFINE_STEP(float32, bfloat16, float32)
DEFINE_STEP(float32, bfloat16, bfloat16)
DEFINE_STEP(bfloat16, float32, float32)
DEFINE_STEP(bfloat16, float32, bfloat16)
DEFINE_STEP(bfloat16, bfloat16, float32)
DEFINE_STEP(bfloat16, bfloat16, bfloat16)

typedef void (*step_of_range)(void *, const void *, void *, int64_t, int64_t, struct factors);

static const step_of_range STEPS[2][2][2] = { /* [parameter is bfloat16][gradient][momentum] */
    {{step_float32_float32_float32, step_float32_float32_bfloat16}, {step_float32_bfloat16_float32, step_float32_bfloat16_bfloat16}},
    {{step_bfloat16_float32_float32, step_bfloat16_float32_bfloat16}, {step_bfloat16_bfloat16_float32, step_bfloat16_bfloat16_bfloat16}},
};

/* ---- many tensors ---- */

struct tensors { /* _Tensors in lion_cpu.py */
    const int64_t *params, *grads, *momenta, *sizes; /* addresses, and numbers of elements */
    int64_t count, elements;
    int32_t param_is_bfloat16, grad_is_bfloat16, momentum_is_bfloat16;
};

/* Elements [from, to) of all tensors one after the other, as far as there are so many. */
static void walk(step_of_range step, const struct tensors *t, int64_t from, int64_t to, struct factors f) {
    for (int64_t i = 0, first = 0; i < t->count && first < to; first += t->sizes[i], i++) {
        int64_t start = from > first ? from - first : 0;
        int64_t end = to - first < t->sizes[i] ? to - first : t->sizes[i];
        if (start < end)
            step((void *)t->params[i], (const void *)t->grads[i], (void *)t->momenta[i], start, end, f);
    }
}

/* Whoever changes the arguments, or the struct, changes the name too: a library that was built before is then not called with them. */
void kdfast_lion(
    const struct tensors *t, int threads, float grad, float decay, float rate, float beta1, float rest1, float beta2, float rest2
) {
    step_of_range step = STEPS[t->param_is_bfloat16][t->grad_is_bfloat16][t->momentum_is_bfloat16];
    struct factors f = {grad, decay, rate, beta1, rest1, beta2, rest2};
    if (threads <= 1 || t->elements <= ALONE) {
        walk(step, t, 0, t->elements, f);
        return;
    }
    int64_t share = ((t->elements + APART - 1) / APART + threads - 1) / threads * APART;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int i = 0; i < threads; i++)
        walk(step, t, i * share, (i + 1) * share, f);
}
