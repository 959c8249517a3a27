// Which form of convolution a layer runs on.
std::unique_ptr<Convolution> make_convolution(const ConvShape& shape, const float* weight, const float* bias) {
    if (DepthwiseConvolution::takes(shape)) return std::make_unique<DepthwiseConvolution>(shape, weight, bias);
    if (SparseConvolution::pays(shape)) return std::make_unique<SparseConvolution>(shape, weight, bias);
    if (OuterConvolution::pays(shape)) return std::make_unique<OuterConvolution>(shape, weight, bias);
    if (DotConvolution::takes(shape)) return std::make_unique<DotConvolution>(shape, weight, bias);
    if (WinogradConvolution::takes(shape)) return std::make_unique<WinogradConvolution>(shape, weight, bias);
#if THRIFTY_VECTOR == 16
    // Packing several taps costs more than it gains for few output channels: shorter vectors fill narrow maps better.
    if (PackedConvolution::pays(shape) && shape.taps() > 1 && shape.out_per_group() <= 128) {
        return avx2::make_convolution(shape, weight, bias);
    }
#endif
    if (PackedConvolution::pays(shape)) return std::make_unique<PackedConvolution>(shape, weight, bias);
    return std::make_unique<DirectConvolution>(shape, weight, bias);
}
