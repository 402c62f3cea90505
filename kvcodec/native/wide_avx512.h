// Numbers of transformed sections with AVX-512: 16 floats, with the parameters of fp32. Included by
// transformed_avx512.cpp inside its target region and namespace.

KVC_INLINE uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

// Integers in the order of the floats they stand for, -0 below +0; its own inverse.
KVC_INLINE __m512i ordered_keys(__m512i bits) {
  const __m512i sign = _mm512_srai_epi32(bits, 31);
  return _mm512_xor_si512(bits, _mm512_and_si512(sign, _mm512_set1_epi32(0x7FFFFFFF)));
}

// Of 16 groups.
struct WideParameters {
  __m512 zero;
  __m512 inverse;
  __m512i stored;  // scale in the upper half, zero in the lower
  __mmask16 inside;
};

// From the smallest and the largest key of each group: the largest magnitude is one of theirs.
KVC_INLINE WideParameters wide_parameters(const SectionCodec& codec, __m512i low, __m512i high) {
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7FFFFFFF);
  const __m512i lowest = ordered_keys(low);
  const __m512i highest = ordered_keys(high);
  const __m512i magnitude = _mm512_max_epu32(_mm512_and_si512(lowest, magnitude_bits),
                                             _mm512_and_si512(highest, magnitude_bits));
  WideParameters p;
  p.inside = _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(static_cast<int>(kDomainEnd)));
  if (!codec.asymmetric) {
    p.zero = _mm512_setzero_ps();
    p.stored = scales_of(_mm512_castsi512_ps(magnitude),
                         _mm512_set1_ps(symmetric_factor(codec.bits)), p.inside, &p.inverse);
    return p;
  }
  // Towards minus infinity: away from zero if negative.
  const __m512i away = _mm512_and_si512(_mm512_srai_epi32(lowest, 31), _mm512_set1_epi32(0xFFFF));
  const __m512i zero = _mm512_and_si512(_mm512_add_epi32(lowest, away),
                                        _mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
  p.zero = _mm512_castsi512_ps(zero);
  const __m512 extent = _mm512_sub_ps(_mm512_castsi512_ps(highest), p.zero);
  p.inside &= _mm512_cmplt_epu32_mask(_mm512_castps_si512(extent),
                                      _mm512_set1_epi32(0x7F800000));
  const __m512i scale =
      scales_of(extent, _mm512_set1_ps(asymmetric_factor(codec.bits)), p.inside, &p.inverse);
  p.stored = _mm512_or_si512(scale, _mm512_maskz_srli_epi32(p.inside, zero, 16));
  return p;
}

// Codes of numbers inside the domain. Adding 1.5 * 2^23 rounds the exact product to an integer.
template <uint32_t kBits>
KVC_INLINE __m512i wide_codes(__m512 v, __m512 zero, __m512 inverse, __m512i bias) {
  const __m512 rounded =
      _mm512_fmadd_ps(_mm512_sub_ps(v, zero), inverse, _mm512_set1_ps(0x1.8p23f));
  return _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(rounded), bias),
                          _mm512_set1_epi32((1 << kBits) - 1));
}

// Codes as floats, the middle one subtracted if symmetric; bits above them do not matter.
template <uint32_t kBits>
struct CodeRamp {
  __m512 ramp;
  __m512i middle;

  explicit KVC_INLINE CodeRamp(bool asymmetric) {
    middle = _mm512_set1_epi32(asymmetric ? 0 : 1 << (kBits - 1));
    const __m512i codes =
        kBits == 4 ? _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
                   : _mm512_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
    ramp = _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, middle));
  }

  KVC_INLINE __m512 values(__m512i codes) const {
    if (kBits != 8) return _mm512_permutexvar_ps(codes, ramp);
    const __m512i masked = _mm512_and_si512(codes, _mm512_set1_epi32(0xFF));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(masked, middle));
  }
};

// 32 numbers in a row as elements. kTame: none is NaN or needs clamping.
template <typename Element, bool kTame>
KVC_INLINE __m512i join_numbers(__m512 first, __m512 second) {
  if (kTame && Element::kEvenOdd) return Bf16::join(first, second);
  if (!kTame) {
    first = clamp<Element>(first);
    second = clamp<Element>(second);
  }
  return _mm512_inserti64x4(_mm512_castsi256_si512(Element::narrow(first)),
                            Element::narrow(second), 1);
}
