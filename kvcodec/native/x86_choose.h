// From a codec to the kernels for it. Included by avx2.cpp and avx512.cpp inside their target
// regions and namespaces, after the kernels, whose names are the same in both.

// Calls use.template call<Element, bits, asymmetric>() for the codec.
template <typename Element, uint32_t kBits, typename Use>
auto with_symmetry(const SectionCodec& codec, Use use) {
  return codec.asymmetric ? use.template call<Element, kBits, true>()
                          : use.template call<Element, kBits, false>();
}

template <typename Element, typename Use>
auto with_bits(const SectionCodec& codec, Use use) {
  if (codec.bits == 8) return with_symmetry<Element, 8>(codec, use);
  if (codec.bits == 4) return with_symmetry<Element, 4>(codec, use);
  return with_symmetry<Element, 2>(codec, use);
}

template <typename Use>
auto with_codec(const SectionCodec& codec, Use use) {
  return codec.dtype == KVC_BF16 ? with_bits<Bf16>(codec, use) : with_bits<Fp16>(codec, use);
}

template <typename Element, uint32_t kBits, bool kAsymmetric>
TokenEncoder token_encoder(bool halves) {
  using Extremes = typename std::conditional<kAsymmetric, SmallestLargest, Magnitude>::type;
  return {find_extremes<Extremes>, find_parameters<Element, kBits, kAsymmetric>,
          halves ? quantise_rows<Element, kBits, kAsymmetric, true>
                 : quantise_rows<Element, kBits, kAsymmetric, false>};
}

template <typename Element, uint32_t kBits, bool kAsymmetric>
TokenDecoder token_decoder(bool halves, bool stream) {
  if (halves) {
    return stream ? decode_rows<Element, kBits, kAsymmetric, true, true>
                  : decode_rows<Element, kBits, kAsymmetric, true, false>;
  }
  return stream ? decode_rows<Element, kBits, kAsymmetric, false, true>
                : decode_rows<Element, kBits, kAsymmetric, false, false>;
}

struct ChooseTokenEncoder {
  bool halves;
  template <typename Element, uint32_t kBits, bool kAsymmetric>
  TokenEncoder call() const {
    return token_encoder<Element, kBits, kAsymmetric>(halves);
  }
};

struct ChooseTokenDecoder {
  bool halves;
  bool stream;
  template <typename Element, uint32_t kBits, bool kAsymmetric>
  TokenDecoder call() const {
    return token_decoder<Element, kBits, kAsymmetric>(halves, stream);
  }
};

using ChannelEncode = uint64_t (*)(const SectionCodec&, const Rows&, const Rows*, uint8_t*);
using ChannelDecode = void (*)(const SectionCodec&, const uint8_t*, const Rows&);

struct ChooseChannelEncoder {
  template <typename Element, uint32_t kBits, bool kAsymmetric>
  ChannelEncode call() const {
    return encode_channel_units<Element, kBits, kAsymmetric>;
  }
};

struct ChooseChannelDecoder {
  bool stream;
  template <typename Element, uint32_t kBits, bool kAsymmetric>
  ChannelDecode call() const {
    return stream ? decode_channel_units<Element, kBits, kAsymmetric, true>
                  : decode_channel_units<Element, kBits, kAsymmetric, false>;
  }
};
