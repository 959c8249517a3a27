// Where every buffer lies in memory, and what is known about it before any image comes.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels/map.h"
#include "program.h"

namespace thrifty {

struct Layout {
    Shape shape;
    Padding halo;              // zeros around each plane: what the convolutions that read it pad by. No step writes it
    std::ptrdiff_t row = 0;    // floats from row to row
    std::ptrdiff_t plane = 0;  // floats from channel to channel
    std::ptrdiff_t offset = 0; // of channel 0, row 0, column 0 in the arena
    bool sparse = false;       // channels may be inactive, by the decisions of an image
    bool whole = false;        // sparse by its operator's guard alone: all channels are active where that runs
    int granule = 1;           // so many neighbouring channels share their activity

    Map map(float* arena) const { return {arena + offset, shape.channels, shape.height, shape.width, row, plane}; }
};

struct Plan {
    // Writes the zeros of all halos, which stay as long as nothing but steps writes to the arena.
    void clear_halos(float* arena) const;

    std::vector<Layout> buffers;
    std::size_t arena = 0;  // floats
    std::vector<int> all;      // 0, 1, 2 … as many as any buffer has channels
    std::vector<float> zeros;  // a row as wide as any buffer
};

// Lays buffers that are never needed at the same time over each other, those with halos only where the halos lie over
// each other too. Throws std::invalid_argument where the arena would take more than limits.memory.
Plan make_plan(const Program& program, const Limits& limits);

}  // namespace thrifty
