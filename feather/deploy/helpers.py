"""C text of the small functions that generated files share."""

from __future__ import annotations

THREADS = """\
#ifdef _OPENMP
#ifndef @_THREADS
#define @_THREADS 1
#endif
#define CHUNKS @_THREADS
#define PARALLEL _Pragma("omp parallel for schedule(static) num_threads(CHUNKS) if(CHUNKS > 1)")
#else
#define CHUNKS 1
#define PARALLEL
#endif
"""

COPY = """\
#define INLINE static inline __attribute__((always_inline, unused))
INLINE void copy_1(f32 *restrict to, const f32 *restrict from, int n, int stride)
{ (void)stride; for (int i = 0; i < n; ++i) to[i] = from[i]; }
INLINE void copy_2(f32 *restrict to, const f32 *restrict from, int n, int stride)
{ (void)stride; for (int i = 0; i < n; ++i) to[i] = from[2 * i]; }
INLINE void copy_3(f32 *restrict to, const f32 *restrict from, int n, int stride)
{ for (int i = 0; i < n; ++i) to[i] = from[i * stride]; }
"""

FILL = """\
static void fill(f32 *p, int n, f32 value)
{ for (int i = 0; i < n; ++i) p[i] = value; }
"""

SUM = """\
static f32 sum(const f32 *p, int n)
{
  vf@ a = {0};
  f32 total = 0.0f;
  int i = 0;
  for (; i + @ <= n; i += @) a += *(const vu@ *)(p + i);
  for (; i < n; ++i) total += p[i];
  for (i = 0; i < @; ++i) total += a[i];
  return total;
}
"""

DOT = """\
static f32 dot(const f32 *x, const f32 *w, int n)
{
  vf@ a = {0}, b = {0};
  f32 total = 0.0f;
  int i = 0;
  for (; i + 2 * @ <= n; i += 2 * @) {
    a += *(const vu@ *)(x + i) * *(const vu@ *)(w + i);
    b += *(const vu@ *)(x + i + @) * *(const vu@ *)(w + i + @);
  }
  for (; i < n; ++i) total += x[i] * w[i];
  a += b;
  for (i = 0; i < @; ++i) total += a[i];
  return total;
}
"""

DOT_INT8 = """\
static f32 dot(const f32 *x, const i8 *w, int n)
{
  f32 a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
  int i = 0;
  for (; i + 4 <= n; i += 4) {
    a += x[i] * (f32)w[i];
    b += x[i + 1] * (f32)w[i + 1];
    c += x[i + 2] * (f32)w[i + 2];
    d += x[i + 3] * (f32)w[i + 3];
  }
  for (; i < n; ++i) a += x[i] * (f32)w[i];
  return (a + b) + (c + d);
}
"""

GATHER = """\
static f32 gather_@(const f32 *x, const @ *columns, const $ *w, int n)
{
  f32 a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
  int i = 0;
  for (; i + 4 <= n; i += 4) {
    a += w[i] * x[columns[i]];
    b += w[i + 1] * x[columns[i + 1]];
    c += w[i + 2] * x[columns[i + 2]];
    d += w[i + 3] * x[columns[i + 3]];
  }
  for (; i < n; ++i) a += w[i] * x[columns[i]];
  return (a + b) + (c + d);
}
"""

# exp(x) = 2^k exp(r) with |r| <= ln 2 / 2, where the series to r^7 errs by less than half a unit in the last place.
SOFTMAX = """\
static f32 exponential(f32 x)
{
  if (!(x > -87.0f)) return x != x ? x : 0.0f;
  const i32 k = (i32)(x * 1.44269504f - 0.5f);
  const f32 r = (x - (f32)k * 0.693145752f) - (f32)k * 1.42860677e-6f;
  f32 p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  union { i32 bits; f32 value; } power = { (k + 127) << 23 };
  return p * power.value;
}

static void softmax(const f32 *x, f32 *y, int n)
{
  f32 top = x[0], total = 0.0f;
  for (int i = 1; i < n; ++i) top = x[i] > top ? x[i] : top;
  for (int i = 0; i < n; ++i) total += y[i] = exponential(x[i] - top);
  for (int i = 0; i < n; ++i) y[i] /= total;
}
"""
