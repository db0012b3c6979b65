// Tile instructions in plain C++, so that the products of tiles can be checked on processors without them. As in the
// processor: bf16 operands, float sums, pair by pair. Included before the source, by the compiler's -include.
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

static thread_local unsigned char tiles[8][16][64];

static inline void emulated_loadconfig(const void* config) {  // any but eight tiles of 16 rows of 64 bytes is a fault
  const uint8_t* at = static_cast<const uint8_t*>(config);
  for (int t = 0; t < 8; t++)
    if (at[0] != 1 || at[16 + 2 * t] != 64 || at[17 + 2 * t] != 0 || at[48 + t] != 16) std::abort();
  std::memset(tiles, 0xff, sizeof tiles);  // stale sums would be NaN
}
static inline float emulated_widen(uint16_t value) {
  uint32_t bits = uint32_t(value) << 16;
  float widened;
  std::memcpy(&widened, &bits, 4);
  return widened;
}
static inline void emulated_dpbf16ps(int sum, int a, int b) {
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 16; n++) {
        float* to = reinterpret_cast<float*>(tiles[sum][m]) + n;
        const uint16_t* x = reinterpret_cast<const uint16_t*>(tiles[a][m]) + 2 * k;
        const uint16_t* y = reinterpret_cast<const uint16_t*>(tiles[b][k]) + 2 * n;
        *to += emulated_widen(x[0]) * emulated_widen(y[0]);
        *to += emulated_widen(x[1]) * emulated_widen(y[1]);
      }
}
static inline void emulated_copy(void* to, long to_stride, const void* from, long from_stride) {
  for (int i = 0; i < 16; i++)
    std::memcpy(static_cast<char*>(to) + i * to_stride, static_cast<const char*>(from) + i * from_stride, 64);
}

#define _tile_loadconfig(config) emulated_loadconfig(config)
#define _tile_release()
#define _tile_zero(t) std::memset(tiles[t], 0, sizeof tiles[t])
#define _tile_loadd(t, from, stride) emulated_copy(tiles[t], 64, from, stride)
#define _tile_stored(t, to, stride) emulated_copy(to, stride, tiles[t], 64)
#define _tile_dpbf16ps(sum, a, b) emulated_dpbf16ps(sum, a, b)
#define RIFORMER_NO_PERMISSION_NEEDED
