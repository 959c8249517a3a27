// Which form of convolution a layer runs on.
std::unique_ptr<Convolution> make_convolution(const ConvShape& shape, const float* weight, const float* bias) {
    if (DepthwiseConvolution::takes(shape)) return std::make_unique<DepthwiseConvolution>(shape, weight, bias);
    if (DotConvolution::takes(shape)) return std::make_unique<DotConvolution>(shape, weight, bias);
    if (WinogradConvolution::takes(shape)) return std::make_unique<WinogradConvolution>(shape, weight, bias);
    if (PackedConvolution::pays(shape)) return std::make_unique<PackedConvolution>(shape, weight, bias);
    return std::make_unique<DirectConvolution>(shape, weight, bias);
}
