// The collapsed RIFormer on a CPU: the whole network in one call, all threads, no pass over memory but the products'.
//
// A block of rows small enough for the second-level cache goes through both products of a block before the next one:
//   prologue  A = scale * x + shift          (norm1, the residual add and norm2, see runtime/collapse.py)
//   fc1       H = gelu(A @ fc1 + bias)       written straight in the form in which the next product reads it
//   fc2       x = gain * x + offset + H @ fc2, in place, and the moments of the new x are summed on the way
// Maps are [token, channel] in float32; only the products' operands are narrower.
//
// Plain C interface at the bottom. Nothing in a network changes once it is built: forward may run in many threads.

#include "products.h"

#include <omp.h>

#include <cmath>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#ifdef RIFORMER_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace riformer {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Array = std::unique_ptr<T[], Free>;
template <class T>
Array<T> array(size_t count) { return Array<T>(allocate<T>(count)); }

Array<float> padded(const float* values, int count) {
  auto copy = array<float>(round_up(count, PANEL));
  std::memcpy(copy.get(), values, count * sizeof(float));
  return copy;
}

struct Range {
  long from, to;
};
// The share of one thread of the rows, in whole units.
Range share(long rows, long unit, int thread, int threads) {
  long units = (rows + unit - 1) / unit;
  return {std::min(rows, units * thread / threads * unit), std::min(rows, units * (thread + 1) / threads * unit)};
}

struct Network {
  virtual ~Network() {}
  virtual void add_conv(const float* weight, const float* bias, int columns, int in_chans, int kernel, int stride,
                        int padding) = 0;
  virtual void add_block(const float* const* tensors, int hidden) = 0;
  virtual void set_head(const float* weight, const float* bias, int columns, float eps) = 0;
  virtual void forward(const float* images, float* logits, int num, int height, int width, int threads) = 0;
  virtual double multiply_in_cache(int threads, int repeats) = 0;
};

template <class P>
struct NetworkOf : Network {
  typedef typename P::T T;

  struct Product {
    Array<T> weight;
    Array<float> bias;
    int columns, k_size, groups;
    Product() = default;
    Product(const float* weight, const float* bias, int columns, int k_size)
        : weight(P::pack(weight, columns, k_size)), bias(padded(bias, columns)), columns(columns),
          k_size(k_size), groups(round_up(k_size, 32) / 32) {}
    int panels() const { return round_up(columns, PANEL) / PANEL; }
  };
  struct Block {
    Array<float> norm1_weight, norm1_bias, norm2_weight, norm2_bias;
    Product fc1, fc2;
  };
  struct Stage {
    Product conv;
    int in_chans, kernel, stride, padding;
    std::vector<Block> blocks;
    int dim() const { return conv.columns; }
    long row() const { return round_up(conv.columns, PANEL); }  // floats of a token
    int out(int size) const { return (size + 2 * padding - kernel) / stride + 1; }
  };

  std::vector<Stage> stages;
  Product head;
  float eps = 0;

  void add_conv(const float* weight, const float* bias, int columns, int in_chans, int kernel, int stride,
                int padding) override {
    // K runs as the operand is read: images as [channel, y, x], lines padded to eights, maps as [y, x, channel, padded].
    const bool is_stem = stages.empty();
    const int line = round_up(kernel, 8), in_row = round_up(in_chans, PANEL);
    const int k_size = is_stem ? in_chans * kernel * line : kernel * kernel * in_row;
    std::vector<float> ordered(size_t(columns) * k_size);
    for (int n = 0; n < columns; n++)
      for (int c = 0; c < in_chans; c++)
        for (int y = 0; y < kernel; y++)
          for (int x = 0; x < kernel; x++)
            ordered[long(n) * k_size + (is_stem ? (c * kernel + y) * line + x : (y * kernel + x) * in_row + c)] =
                *weight++;
    stages.push_back({Product(ordered.data(), bias, columns, k_size), in_chans, kernel, stride, padding, {}});
  }

  void add_block(const float* const* t, int hidden) override {
    int dim = stages.back().dim();
    stages.back().blocks.push_back({padded(t[0], dim), padded(t[1], dim), padded(t[2], dim), padded(t[3], dim),
                                    Product(t[4], t[5], hidden, dim), Product(t[6], t[7], dim, hidden)});
  }

  void set_head(const float* weight, const float* bias, int columns, float norm_eps) override {
    head = Product(weight, bias, columns, stages.back().dim());
    eps = norm_eps;
  }

  // Products whose operands stay in the first-level cache, on every thread: no network can be faster. Returns how many
  // multiply-accumulates they were.
  double multiply_in_cache(int threads, int repeats) override {
    constexpr long CACHE_BYTES = 40 * 1024;
    const long bytes = (P::row_size(2) - P::row_size(1)) * long(sizeof(T));  // of a row's group
    const int groups = CACHE_BYTES / ((P::ROWS + PANEL) * bytes);
    const Vec one = Vec{} + 1;
    auto a = array<T>(round_up(P::ROWS, 16) * P::row_size(groups));
    for (int r = 0; r < P::ROWS; r++)
      for (int k = 0; k < groups; k++) P::put(P::row(a.get(), r, groups) + k * P::GROUP, one, one);
    Array<T> b(P::pack(std::vector<float>(PANEL * groups * 32, 1.0f).data(), PANEL, groups * 32));
#pragma omp parallel num_threads(threads)
    {
      P::begin();
      for (int i = 0; i < repeats; i++)
        P::multiply(a.get(), P::ROWS, b.get(), 0, 1, groups, [](int, int, int, const float* out) {
          asm volatile("" : : "r"(out) : "memory");  // the result counts as read
        });
      P::end();
    }
    return double(threads) * repeats * P::ROWS * PANEL * groups * 32;
  }

  // Scratch memory of one call, kept for the next one. Threads allocate nothing: an exception could not leave them.
  enum { MAP, NEXT_MAP, COEFFICIENTS, SUMS, A, H, EDGE, OFFSETS, NUM_BUFFERS };
  struct Workspace {
    long sizes[NUM_BUFFERS];  // bytes
    Array<char> buffers[NUM_BUFFERS];
    template <class U>
    U* get(int buffer) const { return reinterpret_cast<U*>(buffers[buffer].get()); }
  };
  std::vector<std::unique_ptr<Workspace>> idle;
  std::mutex idle_lock;

  static constexpr long OPERAND_BYTES = 768 * 1024;  // of H for a block of rows: a part of the second-level cache
  static constexpr long MAP_BYTES = 16 << 20;        // of the first stage, for each thread: further images wait

  static long rows_at_once(const Product& widest) {
    return std::max(OPERAND_BYTES / (P::row_size(widest.groups) * long(sizeof(T))) / P::ROWS, 1L) * P::ROWS;
  }
  // Calls compute(first, rows) on blocks of `range` of about equal size, of at most `most` rows.
  template <class Compute>
  static void in_blocks(Range range, long most, Compute compute) {
    if (range.from >= range.to) return;
    long blocks = (range.to - range.from + most - 1) / most;
    long step = round_up((range.to - range.from + blocks - 1) / blocks, P::ROWS);
    for (long first = range.from; first < range.to; first += step)
      compute(first, int(std::min(step, range.to - first)));
  }

  // What one thread does in a part of a batch.
  struct Worker {
    const NetworkOf& net;
    const Workspace& work;
    int num, thread, threads;
    T *a, *h;
    long row, tokens;  // of the current map: floats of a token, tokens of a sample
    Range own_rows;    // rows of it that this thread computes

    float* coefficients(long sample, int which) const {
      return work.template get<float>(COEFFICIENTS) + (sample * 4 + which) * row;
    }
    enum { SCALE, SHIFT, GAIN, OFFSET };
    // Sums of x - centre and of their squares over the rows of a sample that a thread has computed.
    float* sums(int of_thread, long sample, int which) const {
      return work.template get<float>(SUMS) + ((of_thread * long(num) + sample) * 3 + which) * row;
    }
    enum { CENTRE, FIRST, SECOND };

    // Puts a finished piece of a product into the map, and its rows into the sums; the first row becomes the centre.
    template <bool RESIDUAL>
    void emit(float* map, long first, int from, int to, int panel, const float* out, const float* bias) const {
      for (int j = 0; j < PANEL; j += 16) {
        long column = long(panel) * PANEL + j;
        for (int r = from; r < to;) {
          long sample = (first + r) / tokens;
          int end = std::min<long>(to, (sample + 1) * tokens - first);
          Vec gain = RESIDUAL ? load(coefficients(sample, GAIN) + column) : Vec{};
          Vec offset = load((RESIDUAL ? coefficients(sample, OFFSET) : bias) + column);
          float* token = map + (first + r) * row + column;
          auto value = [&](int r) {
            Vec sum = load(out + (r - from) * PANEL + j) + offset;
            return RESIDUAL ? sum + gain * load(token) : sum;
          };
          Vec centre, sum, squares;
          if (first + r == std::max(sample * tokens, own_rows.from)) {
            store(token, centre = value(r++));
            token += row;
            sum = squares = Vec{};
          } else {
            centre = load(sums(thread, sample, CENTRE) + column);
            sum = load(sums(thread, sample, FIRST) + column);
            squares = load(sums(thread, sample, SECOND) + column);
          }
          for (; r < end; r++, token += row) {
            Vec x = value(r), difference = x - centre;
            store(token, x);
            sum += difference;
            squares += difference * difference;
          }
          store(sums(thread, sample, CENTRE) + column, centre);
          store(sums(thread, sample, FIRST) + column, sum);
          store(sums(thread, sample, SECOND) + column, squares);
        }
      }
    }

    // Mean and variance of each channel from the sums of all threads, each taken around the mean of its rows.
    void moments(long sample, float* mean, float* var) const {
      std::fill(mean, mean + row, 0.0f);
      std::fill(var, var + row, 0.0f);
      for (bool centred : {false, true})
        for (int t = 0; t < threads; t++) {
          Range rows = share(num * tokens, P::ROW_UNIT, t, threads);
          float count = std::min(rows.to, (sample + 1) * tokens) - std::max(rows.from, sample * tokens);
          if (count <= 0) continue;
          const float *centre = sums(t, sample, CENTRE), *first = sums(t, sample, FIRST);
          const float* second = sums(t, sample, SECOND);
          for (long c = 0; c < row; c++) {
            float shift = first[c] / count, thread_mean = centre[c] + shift;
            float off = thread_mean - mean[c];
            if (centred) var[c] += (second[c] - shift * first[c] + count * off * off) / tokens;
            else mean[c] += thread_mean * (count / tokens);
          }
        }
    }

    // 1 / standard deviation over all channels of gain * x, given the channels' moments; the mean goes to `centre`.
    float rstd(const float* mean, const float* var, const float* gain, int dim, float* centre) const {
      double sum = 0, within = 0, between = 0;
      for (int c = 0; c < dim; c++) sum += mean[c];
      *centre = sum / dim;
      for (int c = 0; c < dim; c++) {
        double difference = mean[c] - sum / dim;
        between += difference * difference;
        within += std::max(0.0f, var[c]) * (gain ? double(gain[c]) * gain[c] : 1.0);
      }
      return 1 / std::sqrt((within + between) / dim + net.eps);
    }

    void coefficients_of(const Block& block, int dim, long sample) const {
      float *scale = coefficients(sample, SCALE), *shift = coefficients(sample, SHIFT);
      float *gain = coefficients(sample, GAIN), *offset = coefficients(sample, OFFSET);
      float *mean = scale, *var = shift, centre;
      const float *norm1_weight = block.norm1_weight.get(), *norm1_bias = block.norm1_bias.get();
      const float *norm2_weight = block.norm2_weight.get(), *norm2_bias = block.norm2_bias.get();
      moments(sample, mean, var);
      float r = rstd(mean, var, nullptr, dim, &centre);
      for (int c = 0; c < row; c++) {
        gain[c] = 1 + r * norm1_weight[c];
        offset[c] = norm1_bias[c] - norm1_weight[c] * r * centre;
        mean[c] += (mean[c] - centre) * r * norm1_weight[c] + norm1_bias[c];
      }
      r = rstd(mean, var, gain, dim, &centre);
      for (int c = 0; c < row; c++) {
        scale[c] = r * norm2_weight[c] * gain[c];
        shift[c] = norm2_bias[c] + r * norm2_weight[c] * (offset[c] - centre);
        offset[c] += block.fc2.bias[c];
      }
    }

    template <class Compute>
    void for_own_samples(Compute compute) const {
      for (long sample = thread; sample < num; sample += threads) compute(sample);
    }

    // The pixels under the stem's kernel, each line of them padded to whole eights, zero where there is no image.
    static void copy_pixels(const Stage& stage, const float* image, int height, int width, int y0, int x0, float* to) {
      for (int c = 0; c < stage.in_chans; c++)
        for (int y = y0; y < y0 + stage.kernel; y++) {
          const float* line = image + (long(c) * height + y) * width;
          for (int x = x0; x < x0 + round_up(stage.kernel, 8); x++)
            *to++ = y < 0 || y >= height || x < 0 || x >= width ? 0 : line[x];
        }
    }

    void conv(const Stage& stage, bool is_stem, const float* input, long in_row, int height, int width, float* map) {
      const Product& product = stage.conv;
      const int out_width = stage.out(width), groups = product.groups;
      // The stem reads eight pixels at a time, from where they are in the image or from a copy of those at its edge.
      const int line = round_up(stage.kernel, 8), eights = is_stem ? groups * 4 : 0;
      float* edge = work.template get<float>(EDGE) + thread * eights * 8L;
      long *in_image = work.template get<long>(OFFSETS) + thread * eights * 2L, *in_edge = in_image + eights;
      for (int i = 0; i < eights; i++) {
        long x = i * 8L % line, y = i * 8L / line % stage.kernel, c = i * 8L / line / stage.kernel;
        in_image[i] = c < stage.in_chans ? (c * height + y) * width + x : 0;
        in_edge[i] = i * 8L;
      }
      in_blocks(own_rows, rows_at_once(product), [&](long first, int rows) {
        for (int r = 0; r < rows; r++) {
          long sample = (first + r) / tokens, token = (first + r) % tokens;
          int y0 = token / out_width * stage.stride - stage.padding, x0 = token % out_width * stage.stride - stage.padding;
          T* to = P::row(a, r, groups);
          if (is_stem) {
            const float* from = input + sample * stage.in_chans * height * width;
            const long* at = in_image;
            if (y0 >= 0 && y0 + stage.kernel <= height && x0 >= 0 && x0 + line <= width) {
              from += long(y0) * width + x0;
            } else {
              copy_pixels(stage, from, height, width, y0, x0, edge);
              from = edge, at = in_edge;
            }
            for (int g = 0; g < groups; g++, at += 4, to += P::GROUP)
              P::put(to, joined(from + at[0], from + at[1]), joined(from + at[2], from + at[3]));
            continue;
          }
          for (int y = y0; y < y0 + stage.kernel; y++)
            for (int x = x0; x < x0 + stage.kernel; x++) {
              bool inside = y >= 0 && y < height && x >= 0 && x < width;
              const float* from = input + ((sample * height + y) * width + x) * in_row;
              for (long c = 0; c < in_row; c += 32, to += P::GROUP)
                if (inside) P::put(to, load(from + c), load(from + c + 16));
                else P::put(to, Vec{}, Vec{});
            }
        }
        P::multiply(a, rows, product.weight.get(), 0, product.panels(), groups,
                    [&](int from, int to, int panel, const float* out) {
                      emit<false>(map, first, from, to, panel, out, product.bias.get());
                    });
      });
    }

    void mlp(const Block& block, float* map) {
      const Product &fc1 = block.fc1, &fc2 = block.fc2;
      in_blocks(own_rows, rows_at_once(fc2), [&](long first, int rows) {
        for (int r = 0; r < rows; r++) {
          long sample = (first + r) / tokens;
          const float *scale = coefficients(sample, SCALE), *shift = coefficients(sample, SHIFT);
          const float* x = map + (first + r) * row;
          T* to = P::row(a, r, fc1.groups);
          for (long c = 0; c < row; c += 32, to += P::GROUP)
            P::put(to, load(x + c) * load(scale + c) + load(shift + c),
                   load(x + c + 16) * load(scale + c + 16) + load(shift + c + 16));
        }
        P::multiply(a, rows, fc1.weight.get(), 0, fc1.panels(), fc1.groups,
                    [&](int from, int to, int panel, const float* out) {
                      Vec bias0 = load(&fc1.bias[panel * PANEL]), bias1 = load(&fc1.bias[panel * PANEL + 16]);
                      for (int r = from; r < to; r++, out += PANEL)
                        P::put(P::row(h, r, fc2.groups) + panel * P::GROUP, P::gelu(load(out) + bias0),
                               P::gelu(load(out + 16) + bias1));
                    });
        P::multiply(h, rows, fc2.weight.get(), 0, fc2.panels(), fc2.groups,
                    [&](int from, int to, int panel, const float* out) {
                      emit<true>(map, first, from, to, panel, out, nullptr);
                    });
      });
    }

    // head.norm, then the average over the tokens: a row of the last product's operand.
    void pool(int dim, long sample, T* shared_a) const {
      float *mean = coefficients(sample, SCALE), *var = coefficients(sample, SHIFT), centre;
      moments(sample, mean, var);
      float r = rstd(mean, var, nullptr, dim, &centre);
      for (int c = 0; c < row; c++) mean[c] = c < dim ? (mean[c] - centre) * r : 0;
      T* to = P::row(shared_a, sample, net.head.groups);
      for (long c = 0; c < row; c += 32, to += P::GROUP) P::put(to, load(mean + c), load(mean + c + 16));
    }
  };

  void forward(const float* images, float* logits, int num, int height, int width, int threads) override {
    const Stage& stem = stages[0];
    long image_bytes = 4L * stem.out(height) * stem.out(width) * stem.row();
    long at_once = std::max(1L, MAP_BYTES * threads / image_bytes), parts = (num + at_once - 1) / at_once;
    for (long i = 0, from = 0, to; i < parts; i++, from = to) {
      to = num * (i + 1) / parts;
      forward_part(images + from * stem.in_chans * height * width, logits + from * head.columns, to - from, height,
                   width, threads);
    }
  }

  void forward_part(const float* images, float* logits, int num, int height, int width, int threads) {
    long sizes[NUM_BUFFERS];
    std::unique_ptr<Workspace> borrowed = borrow(num, height, width, threads, sizes);
#pragma omp parallel num_threads(threads)
    {
      P::begin();
      const Workspace& work = *borrowed;
      int thread = omp_get_thread_num();
      T* a = work.template get<T>(A);
      Worker worker{*this, work, num, thread, omp_get_num_threads(), a + thread * (sizes[A] / threads / sizeof(T)),
                    work.template get<T>(H) + thread * (sizes[H] / threads / sizeof(T)), 0, 0, {0, 0}};
      const float* input = images;
      long in_row = 0;
      int y = height, x = width;
      for (size_t i = 0; i < stages.size(); i++) {
        const Stage& stage = stages[i];
        float* map = work.template get<float>(i % 2 ? NEXT_MAP : MAP);
        worker.row = stage.row();
        worker.tokens = long(stage.out(y)) * stage.out(x);
        worker.own_rows = share(num * worker.tokens, P::ROW_UNIT, thread, worker.threads);
        worker.conv(stage, i == 0, input, in_row, y, x, map);
#pragma omp barrier
        for (const Block& block : stage.blocks) {
          worker.for_own_samples([&](long sample) { worker.coefficients_of(block, stage.dim(), sample); });
#pragma omp barrier
          worker.mlp(block, map);
#pragma omp barrier
        }
        input = map, in_row = stage.row();
        y = stage.out(y), x = stage.out(x);
      }
      worker.for_own_samples([&](long sample) { worker.pool(stages.back().dim(), sample, a); });
#pragma omp barrier
      Range panels = share(head.panels(), 1, thread, worker.threads);
      P::multiply(a, num, head.weight.get(), panels.from, panels.to, head.groups,
                  [&](int from, int to, int panel, const float* out) {
                    for (int r = from; r < to; r++, out += PANEL)
                      for (int j = 0, n = panel * PANEL; j < PANEL && n < head.columns; j++, n++)
                        logits[long(r) * head.columns + n] = out[j] + head.bias[n];
                  });
      P::end();
    }
    std::lock_guard<std::mutex> guard(idle_lock);
    idle.push_back(std::move(borrowed));
  }

  // A workspace in which this part of a batch fits; `sizes` says how much of each buffer it takes, in bytes.
  std::unique_ptr<Workspace> borrow(int num, int height, int width, int threads, long* sizes) {
    std::fill(sizes, sizes + NUM_BUFFERS, 0);
    long widest = 0;
    for (size_t i = 0; i < stages.size(); i++) {
      const Stage& stage = stages[i];
      height = stage.out(height), width = stage.out(width);
      long& map = sizes[i % 2 ? NEXT_MAP : MAP];
      map = std::max(map, 4 * long(num) * height * width * stage.row());
      widest = std::max(widest, stage.row());
      sizes[A] = std::max(sizes[A], operand(rows_at_once(stage.conv), stage.conv));
      for (const Block& block : stage.blocks) {
        sizes[A] = std::max(sizes[A], operand(rows_at_once(block.fc2), block.fc1));
        sizes[H] = std::max(sizes[H], operand(rows_at_once(block.fc2), block.fc2));
      }
    }
    sizes[A] = std::max(sizes[A], operand(num, head)) * threads;
    sizes[H] *= threads;
    sizes[COEFFICIENTS] = 4 * 4 * num * widest;
    sizes[SUMS] = 4 * 3 * threads * num * widest;
    const long eights = stages[0].conv.groups * 4;
    sizes[EDGE] = threads * eights * 8 * long(sizeof(float));
    sizes[OFFSETS] = threads * eights * 2 * long(sizeof(long));
    std::unique_ptr<Workspace> work;
    {
      std::lock_guard<std::mutex> guard(idle_lock);
      if (!idle.empty()) work = std::move(idle.back()), idle.pop_back();
    }
    if (work && std::equal(sizes, sizes + NUM_BUFFERS, work->sizes, std::less_equal<long>())) return work;
    work = std::make_unique<Workspace>();
    for (int i = 0; i < NUM_BUFFERS; i++) work->buffers[i] = array<char>(work->sizes[i] = sizes[i]);
    return work;
  }
  static long operand(long rows, const Product& product) {
    return round_up(rows, 16) * P::row_size(product.groups) * long(sizeof(T));
  }
};

template <class Call>
int status_of(Call call) {
  try {
    call();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace riformer

extern "C" {

// A network without layers; null where the machine has no such products ("fp32", "bf16" or "bf16x3").
riformer::Network* riformer_new(const char* products) {
  using namespace riformer;
#ifdef RIFORMER_AMX
#ifndef RIFORMER_NO_PERMISSION_NEEDED  // the system grants a process the use of tiles
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA)) return nullptr;
#endif
  if (!std::strcmp(products, "bf16")) return new (std::nothrow) NetworkOf<Amx<false>>;
  if (!std::strcmp(products, "bf16x3")) return new (std::nothrow) NetworkOf<Amx<true>>;
#elif defined(__AVX512BF16__)
  if (!std::strcmp(products, "bf16")) return new (std::nothrow) NetworkOf<Bf16>;
#endif
  return std::strcmp(products, "fp32") ? nullptr : new (std::nothrow) NetworkOf<Fp32>;
}

// The functions that allocate return 0, or 1 where there is no memory.

// Layers come in the order of the network: a convolution, the blocks behind it, the next convolution, ...
int riformer_add_conv(riformer::Network* net, const float* weight, const float* bias, int columns, int in_chans,
                      int kernel, int stride, int padding) {
  return riformer::status_of([&] { net->add_conv(weight, bias, columns, in_chans, kernel, stride, padding); });
}
int riformer_add_block(riformer::Network* net, const float* const* tensors, int hidden) {
  return riformer::status_of([&] { net->add_block(tensors, hidden); });
}
int riformer_set_head(riformer::Network* net, const float* weight, const float* bias, int columns, float eps) {
  return riformer::status_of([&] { net->set_head(weight, bias, columns, eps); });
}

// images [num, in_chans, height, width] -> logits [num, columns of the head].
int riformer_forward(riformer::Network* net, const float* images, float* logits, int num, int height, int width,
                     int threads) {
  return riformer::status_of([&] { net->forward(images, logits, num, height, width, threads); });
}

// Multiply-accumulates done in the first-level cache, which the caller times; -1 where there is no memory.
double riformer_multiply_in_cache(riformer::Network* net, int threads, int repeats) {
  double count = -1;
  riformer::status_of([&] { count = net->multiply_in_cache(threads, repeats); });
  return count;
}

void riformer_delete(riformer::Network* net) { delete net; }

// GELU as the products' epilogue computes it, for a multiple of 16 values.
void riformer_gelu(const float* x, float* y, int count, int close) {
  using namespace riformer;
  for (int i = 0; i < count; i += 16) store(y + i, close ? gelu_close(load(x + i)) : gelu_fast(load(x + i)));
}
}
