// What gates decide on, and the settings of theirs that may change.

#include <cmath>

#include "fields.h"
#include "program.h"

namespace thrifty {

std::array<int, axes> decided(const Program& program, const Operator& op, const GateSettings& settings) {
    const Shape x = op.gate == Gate::none ? Shape{} : program.buffers[static_cast<std::size_t>(op.inputs[0])];
    switch (op.gate) {
        case Gate::none: return {};
        case Gate::topk:
        case Gate::clip: return {program.buffers[static_cast<std::size_t>(op.output)].channels, 0, 0};
        case Gate::layer: return {0, 0, 1};
        case Gate::attention: break;
    }
    const auto pixels = static_cast<int>(x.pixels());
    return {settings.channels < x.channels ? x.channels : 0, settings.columns < pixels ? pixels : 0, 0};
}

void set(GateSettings& settings, const Program& program, const Operator& op, const std::string& name, double value) {
    const auto whole = [&](int& setting, int64_t most) {
        if (!(value >= 1 && value <= static_cast<double>(most)) || value != std::floor(value))
            fail(name + " of '" + shown(op.name) + "' is " + std::to_string(value) + ", but must be an integer in [1, " +
                 std::to_string(most) + "]");
        setting = static_cast<int>(value);
    };
    const auto shape = [&](int buffer) { return program.buffers[static_cast<std::size_t>(buffer)]; };
    if (op.gate == Gate::topk && name == "winners") whole(settings.channels, shape(op.output).channels);
    else if (op.gate == Gate::attention && name == "kept_channels") whole(settings.channels, shape(op.inputs[0]).channels);
    else if (op.gate == Gate::attention && name == "kept_columns") whole(settings.columns, shape(op.inputs[0]).pixels());
    else if ((op.gate == Gate::clip || op.gate == Gate::layer) && name == "threshold") {
        if (!(value >= 0 && value < 1))
            fail("threshold of '" + shown(op.name) + "' is " + std::to_string(value) + ", but must be in [0, 1)");
        settings.threshold = value;
    } else {
        fail("'" + shown(op.name) + "' has no gate with the setting '" + shown(name) + "'");
    }
}

}  // namespace thrifty
