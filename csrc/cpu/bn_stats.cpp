#include "vectors.h"

namespace rf::cpu {
namespace {

void merge_tiles(
    const Image& image, const Tiles& tiles, const double* partials, std::vector<double>& mean,
    std::vector<double>& var) {
  for (int64_t c = 0; c < image.c; ++c) {
    Moments<double> all = {0.0, 0.0, 0.0};
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const double* at = partials + tile * 2 * image.c + c;
      const double count = static_cast<double>(tile_positions(image, tiles, tile));
      all = merge(all, {count, at[0], at[image.c]});
    }
    mean[c] = all.mean;
    var[c] = all.count > 0.0 ? all.m2 / all.count : 0.0;
  }
}

}  // namespace

void bn_stats(const Tensor& input, const Tensor& mean, const Tensor& var) {
  const Images images = check_bn_stats(input, mean, var);
  const Image image = image_of(input, images);
  const Tiles tiles = tiles_of(image);
  std::vector<double> partials(tiles.count * 2 * image.c);
  kernels().stats[dtype_of(images.dtype())]({image, tiles, input.data_ptr(), partials.data()});
  std::vector<double> means(image.c), vars(image.c);
  merge_tiles(image, tiles, partials.data(), means, vars);
  write_vector(means, mean);
  write_vector(vars, var);
}

STABLE_TORCH_LIBRARY_IMPL(resunet_fast_native, CPU, m) { m.impl("bn_stats", RF_BOX(&bn_stats)); }

}  // namespace rf::cpu
