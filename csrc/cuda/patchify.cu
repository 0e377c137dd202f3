// Videos [C, T, H, W] to packed patches [N, pt ph pw C] and back: a transpose, element by element, of any 2-byte or 4-byte type.
//
// A block owns a tile of up to kTokens consecutive tokens of one video, with all channels. Of the pt ph lines of a patch it takes
// all if they fit, or else one. The tile goes through shared memory, and each element moves once in and once out:
//
//   the video's side    neighbouring threads take neighbouring positions along W and loop over lines and channels, so that warps
//                       read or write whole sectors
//   the tokens' side    neighbouring threads take neighbouring elements of a token, 16 bytes at a time where rows allow it
//
// A video may have any strides, and videos any number and sizes. Their addresses, strides and grids are kernel arguments, up to
// kVideos to a launch. So nothing is copied to the device, and a graph can capture the launch.
#include "common.cuh"
#include "kernels.h"

namespace sora::cuda {
namespace {

constexpr int kVideos = 32;
constexpr int kThreads = 256;
constexpr int kTokens = 128;
constexpr size_t kTileBytes = 32 * 1024;

template <class T>
struct Video {
  T* data;
  int64_t channel, t, h, w;  // strides
  int32_t grid_h, grid_w;    // in patches
  int64_t first_token, tokens;
  int64_t first_block;
};

template <class T>
struct Tiles {
  Video<T> videos[kVideos];
  Rows<T> tokens;
  int32_t num_videos, pt, ph, pw, channels;
  int32_t tile;   // tokens of a tile
  int32_t lines;  // lines of a patch that a block takes: blockIdx.y counts the groups of them
};

// The part of a token that a block takes is `lines` pieces of pw C elements, one behind the other. Rows of the tile in shared
// memory are 16 bytes longer than that, which spreads a column over the banks.
template <class T>
__host__ __device__ __forceinline__ int tile_pitch(const Tiles<T>& a) {
  const int vector = 16 / sizeof(T), length = a.lines * a.pw * a.channels;
  return (length + vector - 1) / vector * vector + vector;
}

// Copies between the tile and the video.
template <bool TO_TOKENS, class T>
__device__ __forceinline__ void move_video(const Tiles<T>& a, const Video<T>& video, int64_t first, int count, T* tile) {
  const int positions = count * a.pw, step = max(static_cast<int>(blockDim.x) / positions, 1), pitch = tile_pitch(a);
  for (int x = threadIdx.x; x < step * positions; x += blockDim.x) {
    const int position = x % positions, token = position / a.pw, l = position % a.pw;
    const int64_t n = first + token, row = n / video.grid_w, w = n % video.grid_w, h = row % video.grid_h, t = row / video.grid_h;
    for (int line = 0; line < a.lines; ++line) {
      const int of_patch = blockIdx.y * a.lines + line, i = of_patch / a.ph, j = of_patch % a.ph;
      if (i >= a.pt) break;
      T* at = video.data + (t * a.pt + i) * video.t + (h * a.ph + j) * video.h + (w * a.pw + l) * video.w;
      T* in_tile = tile + token * pitch + (line * a.pw + l) * a.channels;
#pragma unroll 8
      for (int c = x / positions; c < a.channels; c += step) {
        if constexpr (TO_TOKENS)
          in_tile[c] = at[c * video.channel];
        else
          at[c * video.channel] = in_tile[c];
      }
    }
  }
}

// Copies between the tile and the tokens.
template <bool TO_TOKENS, int VEC, class T>
__device__ __forceinline__ void move_tokens(const Tiles<T>& a, int64_t first, int count, T* tile) {
  const int piece = a.pw * a.channels, offset = blockIdx.y * a.lines * piece, pitch = tile_pitch(a);
  const int length = min(a.lines * piece, a.pt * a.ph * piece - offset);
  const int vectors = length / VEC;
#pragma unroll 2
  for (int i = threadIdx.x; i < count * vectors; i += kThreads) {
    const int token = i / vectors, k = (i - token * vectors) * VEC;
    T *in_row = a.tokens[first + token] + offset + k, *in_tile = tile + token * pitch + k;
    using Move = Vector<T, VEC>;
    if constexpr (TO_TOKENS)
      *reinterpret_cast<Move*>(in_row) = *reinterpret_cast<const Move*>(in_tile);
    else
      *reinterpret_cast<Move*>(in_tile) = *reinterpret_cast<const Move*>(in_row);
  }
}

template <bool TO_TOKENS, int VEC, class T>
__global__ void __launch_bounds__(kThreads, 4) rearrange(const __grid_constant__ Tiles<T> a) {
  int v = 0;
  while (v + 1 < a.num_videos && a.videos[v + 1].first_block <= blockIdx.x) ++v;
  const Video<T>& video = a.videos[v];
  const int64_t first = (blockIdx.x - video.first_block) * a.tile;  // in its video
  const int count = static_cast<int>(min(static_cast<int64_t>(a.tile), video.tokens - first));
  T* tile = reinterpret_cast<T*>(shared_memory);
  if constexpr (TO_TOKENS)
    move_video<true>(a, video, first, count, tile);
  else
    move_tokens<false, VEC>(a, video.first_token + first, count, tile);
  __syncthreads();
  if constexpr (TO_TOKENS)
    move_tokens<true, VEC>(a, video.first_token + first, count, tile);
  else
    move_video<false>(a, video, first, count, tile);
}

template <bool TO_TOKENS, class T>
void run(const PatchEmbed& p) {
  const char* op = TO_TOKENS ? "patchify_3d" : "unpatchify_3d";
  Tiles<T> a{};
  a.tokens = rows<T>(p.tokens), a.pt = p.patch[0], a.ph = p.patch[1], a.pw = p.patch[2];
  const int patch_lines = a.pt * a.ph, volume = patch_lines * a.pw;
  a.channels = static_cast<int>(p.tokens.size[1] / volume);
  // Whole tokens if a few of them fit, or else a line of a patch at a time.
  const size_t line = a.pw * a.channels * sizeof(T);
  a.lines = patch_lines * line * 4 <= kTileBytes ? patch_lines : 1;
  a.tile = 1;
  const size_t row = tile_pitch(a) * sizeof(T);
  a.tile = static_cast<int>(std::clamp<size_t>(kTileBytes / row, 1, kTokens));
  if (row > max_shared_memory(op))
    throw std::invalid_argument(std::string("sora_kernels: ") + op + ": a line of a patch, " + std::to_string(line) +
                                " bytes in all channels, needs more shared memory than this GPU has");

  constexpr int kWide = 16 / sizeof(T);
  const bool wide = a.pw * a.channels % kWide == 0 && aligned(16, {&p.tokens});
  const Launch on{op, current_stream(p.tokens)};
  int64_t token = 0, blocks = 0;
  for (int64_t i = 0; i < p.num_videos; ++i) {
    const Tensor& from = p.videos[i];
    Video<T> v{static_cast<T*>(from.data), from.stride[0], from.stride[1], from.stride[2], from.stride[3]};
    v.grid_h = static_cast<int>(from.size[2] / a.ph), v.grid_w = static_cast<int>(from.size[3] / a.pw);
    v.first_token = token, v.tokens = from.size[1] / a.pt * v.grid_h * v.grid_w, v.first_block = blocks;
    token += v.tokens, blocks += ceil_div(v.tokens, a.tile);
    if (v.tokens > 0) a.videos[a.num_videos++] = v;
    if (a.num_videos == kVideos || (i + 1 == p.num_videos && a.num_videos > 0)) {
      const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(patch_lines, a.lines)));
      launch(on, wide ? rearrange<TO_TOKENS, kWide, T> : rearrange<TO_TOKENS, 1, T>, grid, kThreads, row * a.tile, a);
      a.num_videos = 0, blocks = 0;
    }
  }
}

template <bool TO_TOKENS>
void run(const PatchEmbed& p) {
  if (p.tokens.dtype == DType::kFloat32)
    run<TO_TOKENS, uint32_t>(p);
  else
    run<TO_TOKENS, uint16_t>(p);
}

}  // namespace

void patchify_3d(const PatchEmbed& p) { run<true>(p); }
void unpatchify_3d(const PatchEmbed& p) { run<false>(p); }

}  // namespace sora::cuda
