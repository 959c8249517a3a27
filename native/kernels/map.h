// The memory of one image's activation: planes of pixels, channel after channel.
#pragma once

#include <cstddef>

namespace thrifty {

// A planar map. Around each plane there may be a halo of zeros, so that a convolution reads its padding like any pixel.
struct Map {
    float* data = nullptr;    // channel 0, row 0, column 0: inside the halo
    int channels = 0;
    int height = 0;           // in pixels, without the halo
    int width = 0;
    std::ptrdiff_t row = 0;   // floats from one row to the next
    std::ptrdiff_t plane = 0; // floats from one channel to the next

    float* channel(int c) const { return data + c * plane; }
    int pixels() const { return height * width; }
};

// Whether a channel's rows lie without a gap between them, so that they can be taken for one. True of a map that is not there.
inline bool gapless(const Map& map) { return map.data == nullptr || map.row == map.width; }

// The channels of a map that are not known to be zero, in rising order.
struct Channels {
    const int* index = nullptr;
    int count = 0;
};

}  // namespace thrifty
