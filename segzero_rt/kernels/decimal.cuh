// Decimal text to the nearest double, ties to even: what Python's `float` gives for the same token.
//
// Up to 15 significant digits and a power of ten up to 22 are exact in one operation (Clinger, "How to read floating
// point numbers accurately", 1990). Anything else goes through a long division of two big integers, which is slow,
// always right, and rare: coordinates are short.
#pragma once

#include "portable.cuh"

namespace segzero {

constexpr u32 kMaxNumberChars = 1024;  // json_reader.MAX_NUMBER_CHARS
// 10 ** (324 + 1024), the largest divisor, has 4478 bits; 64 more for aligning.
constexpr u32 kLimbs = 144;

struct BigInteger {
    u32 size;
    u32 limb[kLimbs];

    SZ_HD void multiply_add(u32 factor, u32 carry) {
        u64 rest = carry;
        for (u32 i = 0; i < size; ++i) {
            rest += u64(limb[i]) * factor;
            limb[i] = u32(rest);
            rest >>= 32;
        }
        if (rest != 0) limb[size++] = u32(rest);
    }
    SZ_HD void multiply_power_of_ten(u32 exponent) {
        for (; exponent >= 9; exponent -= 9) multiply_add(1000000000u, 0);
        for (; exponent > 0; --exponent) multiply_add(10u, 0);
    }
    SZ_HD u32 bit_length() const {
        u32 bits = 0;
        for (u32 top = limb[size - 1]; top != 0; top >>= 1) ++bits;
        return 32 * (size - 1) + bits;
    }
    SZ_HD void shift_left(u32 count) {
        const u32 limbs = count / 32, bits = count % 32;
        const u32 grown = size + limbs + 1;
        for (u32 i = grown; i-- > 0;) {
            const u32 high = i >= limbs && i - limbs < size ? limb[i - limbs] : 0;
            const u32 low = i >= limbs + 1 && i - limbs - 1 < size ? limb[i - limbs - 1] : 0;
            limb[i] = bits == 0 ? high : (high << bits) | (low >> (32 - bits));
        }
        size = grown;
        while (size > 1 && limb[size - 1] == 0) --size;
    }
    SZ_HD bool is_zero() const { return size == 1 && limb[0] == 0; }
    SZ_HD bool at_least(const BigInteger& other) const {
        if (size != other.size) return size > other.size;
        for (u32 i = size; i-- > 0;) {
            if (limb[i] != other.limb[i]) return limb[i] > other.limb[i];
        }
        return true;
    }
    SZ_HD void subtract(const BigInteger& other) {  // `other` is not larger
        u64 borrow = 0;
        for (u32 i = 0; i < size; ++i) {
            const u64 taken = (i < other.size ? other.limb[i] : 0) + borrow;
            borrow = limb[i] < taken;
            limb[i] = u32(limb[i] - taken);
        }
        while (size > 1 && limb[size - 1] == 0) --size;
    }
};

// `quotient` * 2 ** `exponent`, rounded to a double; `more` says that the quotient was cut off.
SZ_HD inline double round_to_double(u64 quotient, int exponent, bool more) {
    int bits = 0;
    for (u64 rest = quotient; rest != 0; rest >>= 1) ++bits;
    const int top = bits - 1 + exponent;
    const int precision = top >= -1022 ? 53 : 53 - (-1022 - top);
    const int dropped = bits - precision;
    if (precision < 0) return 0.0;
    if (dropped <= 0) return ldexp(double(quotient), exponent);
    u64 kept = dropped >= 64 ? 0 : quotient >> dropped;
    const u64 half = u64(1) << (dropped - 1);
    const u64 rest = dropped >= 64 ? quotient : quotient & ((half << 1) - 1);
    if (rest > half || (rest == half && (more || (kept & 1) != 0))) ++kept;
    return ldexp(double(kept), exponent + dropped);
}

// The exact way. `digits` stand in [begin, end) of the text, a point among them perhaps; value = digits * 10 ** exponent
// with `exponent` already counted from the last digit. `significant` digits follow the leading zeros.
SZ_HD_CALL inline double divide_exactly(const u8* text, Span digits, int significant, int exponent) {
    if (significant + exponent > 310) return HUGE_VAL;
    if (significant + exponent <= -324) return 0.0;
    BigInteger number, divisor;
    number.size = divisor.size = 1;
    number.limb[0] = 0;
    divisor.limb[0] = 1;
    for (u32 at = digits.begin; at < digits.end; ++at) {
        if (is_digit(text[at])) number.multiply_add(10u, u32(text[at] - '0'));
    }
    if (exponent >= 0) {
        number.multiply_power_of_ten(u32(exponent));
    } else {
        divisor.multiply_power_of_ten(u32(-exponent));
    }
    const int shift = int(divisor.bit_length()) - int(number.bit_length());
    if (shift >= 0) {
        number.shift_left(u32(shift));
    } else {
        divisor.shift_left(u32(-shift));
    }
    u64 quotient = 0;  // of number / divisor, which lies between 1/2 and 2, times 2 ** 63
    for (int bit = 0; bit < 64; ++bit) {
        quotient <<= 1;
        if (number.at_least(divisor)) {
            number.subtract(divisor);
            quotient |= 1;
        }
        number.shift_left(1);
    }
    return round_to_double(quotient, -63 - shift, !number.is_zero());
}

// The value of a number's text: [sign] digits with at most one point among them [e [sign] digits], at most
// `kMaxNumberChars` long. Beyond a double's range it is infinite.
SZ_HD_CALL inline double read_decimal(const u8* text, u32 at, u32 end) {
    constexpr double kPowers[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                                  1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
    const bool negative = text[at] == '-';
    if (negative || text[at] == '+') ++at;
    const u32 begin = at;
    u64 mantissa = 0;
    int significant = 0, after_point = 0;
    bool point = false;
    for (; at < end; ++at) {
        if (is_digit(text[at])) {
            if (significant > 0 || text[at] != '0') ++significant;
            if (significant <= 19) mantissa = 10 * mantissa + u64(text[at] - '0');
            if (point) ++after_point;
        } else if (text[at] == '.') {
            point = true;
        } else {
            break;
        }
    }
    const Span digits = {begin, at};
    int exponent = 0;
    if (at < end) {  // the letter e
        ++at;
        const bool minus = text[at] == '-';
        if (minus || text[at] == '+') ++at;
        for (; at < end; ++at) {
            if (exponent < 1000000) exponent = 10 * exponent + (text[at] - '0');
        }
        if (minus) exponent = -exponent;
    }
    exponent -= after_point;
    double value;
    if (significant == 0) {
        value = 0.0;
    } else if (significant <= 15 && exponent >= -22 && exponent <= 22) {
        value = exponent < 0 ? double(mantissa) / kPowers[-exponent] : double(mantissa) * kPowers[exponent];
    } else {
        value = divide_exactly(text, digits, significant, exponent);
    }
    return negative ? -value : value;
}

}  // namespace segzero
