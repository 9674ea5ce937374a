// Jitter, gray, blur, solarize and normalise views, as colour.py does; compiled.py has it compiled for this machine.
//
// A view's pixels go through all operations a tile at a time, in the nearest cache, and only its mean (for contrast) and its
// blur need another pass. What is written depends on the view alone: not on its neighbours, nor on the number of threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int TILE = 512, BLOCK = 32, LANES = 16;
enum { BRIGHTNESS, CONTRAST, SATURATION, HUE };

struct Draws {  // of n views, as ViewDraws has them; `reach` and `taps` are a blur's half kernel, [n] and [n, radius + 1]
    const uint8_t *jitter, *gray, *solarize;
    const int64_t *order, *reach;
    const float *factors, *taps;
};

struct Shape {
    int64_t views, channels, size, radius, threads;
    const float *mean, *scale;  // of each channel; scale is 1 / std
};

inline float least(float a, float b) { return a < b ? a : b; }
inline float most(float a, float b) { return a > b ? a : b; }
inline float unit(float x) { return least(most(x, 0.f), 1.f); }
inline int64_t mirrored(int64_t i, int64_t size) { return i < 0 ? -i : i >= size ? 2 * size - 2 - i : i; }

typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));  // of GCC and Clang; sums stay in registers

inline Floats load(const float *from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

template <int C> using Tile = float[C][TILE];

template <int C> inline float gray_of(const Tile<C> &x, int i) {
    if constexpr (C == 3) return .2989f * x[0][i] + .587f * x[1][i] + .114f * x[2][i];
    return x[0][i];  // without 3 channels there is no colour, and each is its own gray
}

template <int C> void blend(Tile<C> &x, float kept, float to_gray, float more) {
    for (int i = 0; i < TILE; i++) {
        const float added = to_gray * gray_of<C>(x, i) + more;
        for (int c = 0; c < C; c++) x[c][i] = unit(kept * x[c][i] + added);
    }
}

// As _shift_hue of colour.py, where it is explained.
void shift_hue(Tile<3> &x, float shift) {
    constexpr float opposite[3] = {2.f, 5 / 3.f, 4 / 3.f};
    for (int i = 0; i < TILE; i++) {
        const float red = x[0][i], green = x[1][i], blue = x[2][i];
        const float value = most(most(red, green), blue), low = least(least(red, green), blue), spread = value - low;
        const float sixths = std::copysign(value - red + green + blue - 2 * low, green - blue);
        const float turn = shift + sixths / (6 * most(spread, 1e-30f));
        for (int c = 0; c < 3; c++) {
            const float place = turn + opposite[c];
            x[c][i] = value - spread * unit(2 - 6 * std::fabs(place - std::floor(place) - .5f));
        }
    }
}

template <int C> void adjust(Tile<C> &x, const int64_t *order, int from, int to, const float *factors) {
    for (int place = from; place < to; place++) {
        const float factor = factors[order[place]];
        if (order[place] == BRIGHTNESS) blend<C>(x, factor, 0, 0);
        if (order[place] == SATURATION) blend<C>(x, factor, 1 - factor, 0);
        if constexpr (C == 3)
            if (order[place] == HUE && factor != 0) shift_hue(x, factor);
    }
}

void finish(const float *x, float *view, int count, bool solarize, float mean, float scale) {
    for (int i = 0; i < count; i++) {
        const float seen = solarize && x[i] >= .5f ? 1 - x[i] : x[i];
        view[i] = (seen - mean) * scale;
    }
}

// One row of a blur: `behind` and `ahead` of j hold what lies t steps before and after the pixel.
template <class Before, class After>
void weigh(const float *x, float *y, int64_t size, const float *taps, int64_t reach, Before before, After after) {
    for (int64_t j = 0; j < size; j += BLOCK) {  // what is beyond the end is computed too, and not looked at
        Floats sum[BLOCK / LANES];
        for (int k = 0; k < BLOCK / LANES; k++) sum[k] = taps[0] * load(x + j + k * LANES);
        for (int64_t t = 1; t <= reach; t++) {
            const float *b = before(t) + j, *a = after(t) + j;
            for (int k = 0; k < BLOCK / LANES; k++) sum[k] += taps[t] * (load(b + k * LANES) + load(a + k * LANES));
        }
        std::memcpy(y + j, sum, sizeof sum);
    }
}

void blur(const float *x, float *view, const Shape &shape, const float *taps, int64_t reach, bool solarize, int64_t channel) {
    const int64_t size = shape.size;
    std::vector<float> memory(size + 2 * reach + BLOCK), across(size + BLOCK);
    float *down = memory.data() + reach;
    for (int64_t row = 0; row < size; row++) {
        weigh(x + row * size, down, size, taps, reach,
              [&](int64_t t) { return x + mirrored(row - t, size) * size; },
              [&](int64_t t) { return x + mirrored(row + t, size) * size; });
        for (int64_t t = 1; t <= reach; t++) down[-t] = down[t], down[size - 1 + t] = down[size - 1 - t];
        weigh(down, across.data(), size, taps, reach, [&](int64_t t) { return down - t; }, [&](int64_t t) { return down + t; });
        finish(across.data(), view + row * size, size, solarize, shape.mean[channel], shape.scale[channel]);
    }
}

// C channels of a view, from channel `first` on. `x` is room for them.
template <int C, class Pixel>
void colour(const Pixel *crop, float *view, int64_t first, const Shape &shape, const Draws &draws, int64_t n, float *x) {
    const int64_t area = shape.size * shape.size, stride = area + BLOCK;
    const float *factors = draws.factors + 4 * n, unit_of = 1.f / Pixel(-1);
    const int64_t *order = draws.order + 4 * n;
    const int contrast = std::find(order, order + 4, int64_t(CONTRAST)) - order;
    const bool jitter = draws.jitter[n], blurred = draws.reach[n], solarize = draws.solarize[n];
    crop += first * area, view += first * area;
    alignas(64) Tile<C> tile = {};
    double sum = 0;
    for (int64_t start = 0; start < area; start += TILE) {
        const int count = std::min<int64_t>(TILE, area - start);
        for (int c = 0; c < C; c++)
            for (int i = 0; i < count; i++) tile[c][i] = unit_of * crop[c * area + start + i];
        if (jitter) {
            adjust<C>(tile, order, 0, contrast, factors);
            float gray = 0;
            for (int i = 0; i < count; i++) gray += gray_of<C>(tile, i);
            sum += gray;
        }
        for (int c = 0; c < C; c++) std::copy(tile[c], tile[c] + count, x + c * stride + start);
    }
    const float factor = factors[CONTRAST], more = (1 - factor) * float(sum / area);
    for (int64_t start = 0; start < area; start += TILE) {
        const int count = std::min<int64_t>(TILE, area - start);
        for (int c = 0; c < C; c++) std::copy(x + c * stride + start, x + c * stride + start + count, tile[c]);
        if (jitter) {
            blend<C>(tile, factor, 0, more);
            adjust<C>(tile, order, contrast + 1, 4, factors);
        }
        if (draws.gray[n]) blend<C>(tile, 0, 1, 0);
        for (int c = 0; c < C; c++)
            if (blurred) std::copy(tile[c], tile[c] + count, x + c * stride + start);
            else finish(tile[c], view + c * area + start, count, solarize, shape.mean[first + c], shape.scale[first + c]);
    }
    if (blurred)
        for (int c = 0; c < C; c++)
            blur(x + c * stride, view + c * area, shape, draws.taps + n * (shape.radius + 1), draws.reach[n], solarize, first + c);
}

template <class Pixel> void colour_views(const Pixel *crops, float *views, const Shape &shape, const Draws &draws) {
    const int64_t area = shape.size * shape.size;
    std::atomic<int64_t> next{0};
    auto some = [&] {
        std::vector<float> room(3 * (area + BLOCK));
        for (int64_t n; (n = next++) < shape.views;) {
            const int64_t place = n * shape.channels * area;
            if (shape.channels == 3) colour<3>(crops + place, views + place, 0, shape, draws, n, room.data());
            else for (int64_t c = 0; c < shape.channels; c++)
                colour<1>(crops + place, views + place, c, shape, draws, n, room.data());
        }
    };
    std::vector<std::thread> others;
    try {
        for (int64_t thread = 1; thread < std::min(shape.threads, shape.views); thread++) others.emplace_back(some);
    } catch (const std::system_error &) {  // no more threads are to be had: those that are there do it all
    }
    some();
    for (auto &thread : others) thread.join();
}

}  // namespace

extern "C" void simclr_colour(int64_t bits, const void *crops, float *views, const Shape *shape, const Draws *draws) {
    if (bits == 8) colour_views(static_cast<const uint8_t *>(crops), views, *shape, *draws);
    else colour_views(static_cast<const uint16_t *>(crops), views, *shape, *draws);
}
