// One operator as it comes from outside: each attribute and tensor is checked as it is taken.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "program.h"

namespace thrifty {

inline constexpr std::int64_t max_extent = 1 << 24;  // channels, height, width, padding, dilation: sums of a few fit an int

// Text of a hostile file, fit for one line of an error.
inline std::string shown(const std::string& text) {
    std::string result;
    for (const char c : text.substr(0, 80)) result += c >= ' ' && c < 0x7f ? c : '?';
    return result + (text.size() > 80 ? "..." : "");
}

inline std::string text(const std::vector<std::int64_t>& shape) {
    std::string result = "[";
    for (std::size_t i = 0; i < shape.size() && i < 8; ++i) result += (i ? ", " : "") + std::to_string(shape[i]);
    return result + (shape.size() > 8 ? ", ...]" : "]");
}

inline std::string text(const Shape& shape) { return text(std::vector<std::int64_t>{shape.channels, shape.height, shape.width}); }

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message + "."); }

// What operators of all kinds read themselves from.
class Fields {
public:
    Fields(const OperatorSource& source, std::size_t place)
        : source_(source), where_("operator " + std::to_string(place) + " (" + shown(source.kind) +
          (source.name.empty() ? "" : " '" + shown(source.name) + "'") + ")") {}

protected:
    using int64_t = std::int64_t;
    using string = std::string;

    [[noreturn]] void wrong(const string& message) const { fail(where_ + ": " + message); }
    void require(bool condition, const string& message) const { if (!condition) wrong(message); }

    // ---- attributes

    bool given(const char* attribute) const { return source_.attributes.contains(attribute); }

    template <class T>
    const T* attribute(const char* name, const char* type) const {
        const auto found = source_.attributes.find(name);
        if (found == source_.attributes.end()) return nullptr;
        const T* value = std::get_if<T>(&found->second);
        require(value != nullptr, string("attribute '") + name + "' must be " + type);
        return value;
    }

    int integer(const char* name, int64_t least, int64_t most, int64_t otherwise) const {
        const int64_t* found = attribute<int64_t>(name, "an integer");
        const int64_t value = found ? *found : otherwise;
        require(value >= least && value <= most, string("attribute '") + name + "' is " + std::to_string(value) +
                ", but must be in [" + std::to_string(least) + ", " + std::to_string(most) + "]");
        return static_cast<int>(value);
    }

    double number(const char* name, double otherwise) const {
        double value = otherwise;
        if (const auto found = source_.attributes.find(name); found != source_.attributes.end()) {
            if (const auto* whole = std::get_if<int64_t>(&found->second)) value = static_cast<double>(*whole);
            else value = *attribute<double>(name, "a number");
        }
        require(std::isfinite(value) && std::abs(value) <= 3e38, string("attribute '") + name + "' must be finite");
        return value;
    }

    // `count` integers in [least, max_extent]; where the attribute is missing, all are `otherwise` (< 0: it is needed).
    std::vector<int> integers(const char* name, std::size_t count, int64_t least, int otherwise) const {
        const auto* found = attribute<std::vector<int64_t>>(name, "a tuple of integers");
        if (!found) {
            require(otherwise >= 0, string("attribute '") + name + "' is missing");
            return std::vector<int>(count, otherwise);
        }
        require(found->size() == count, string("attribute '") + name + "' has " + std::to_string(found->size()) +
                " numbers, but needs " + std::to_string(count));
        for (const int64_t value : *found)
            require(value >= least && value <= max_extent, string("attribute '") + name + "' is " + text(*found) +
                    ", but each must be in [" + std::to_string(least) + ", " + std::to_string(max_extent) + "]");
        return {found->begin(), found->end()};
    }

    // ---- tensors

    bool has(const char* role) const { return source_.tensors.contains(role); }

    const void* tensor(const char* role, TensorSource::Type type, const std::vector<int64_t>& shape) const {
        const auto found = source_.tensors.find(role);
        require(found != source_.tensors.end(), string("tensor '") + role + "' is missing");
        const TensorSource& tensor = found->second;
        const bool floats = type == TensorSource::Type::float32;
        require(tensor.type == type, string("tensor '") + role + "' must be " + (floats ? "float32" : "int32"));
        require(tensor.shape == shape, string("tensor '") + role + "' is " + text(tensor.shape) + ", but must be " + text(shape));
        require(tensor.contiguous && tensor.data && reinterpret_cast<std::uintptr_t>(tensor.data) % 4 == 0,
                string("tensor '") + role + "' must be contiguous in C order and aligned");
        return tensor.data;
    }

    const float* floats(const char* role, const std::vector<int64_t>& shape) const {
        return static_cast<const float*>(tensor(role, TensorSource::Type::float32, shape));
    }

    const OperatorSource& source_;

private:
    std::string where_;
};

}  // namespace thrifty
