// One step of GPTQ (Frantar et al.: GPTQ, arXiv 2210.17323): a row's next 64 columns are rounded to int4 one
// after the other, and the columns behind each make up for its error, as far as the inputs that the row is
// multiplied with go together.
//
// With H, the inputs' second moments [columns, columns], and U the upper triangular matrix for which
// transpose(U) U = inverse(H): rounding column j off by d costs d² / U[j, j]² of the output's squared error
// once the columns behind it have become  column k -= d / U[j, j] * U[j, k].
#pragma once

#include <cstdint>

namespace lighter {

// What all rows share for one group of columns.
struct GptqGroup {
  const float* factor = nullptr;      // [64, 64], these columns' block of U: row j is 0 before column j
  const float* importance = nullptr;  // [64], proportional to 1 / U[j, j]², with the sum 64
};

// Rounds one row's group: scale and minimum by the search of quantize_int4, errors weighted with the
// importance; q, 32 bytes, as packed_slice.h has it. errors [64]: d / U[j, j], for the columns behind the
// group, which become  column k -= sum of errors[j] * U[j, k]. False, and nothing of use, if a value is a
// NaN, an infinity or beyond fp16. Thread-safe.
bool gptq_int4(const float* values, const GptqGroup& group, uint8_t* q, uint16_t* scale, uint16_t* minimum,
               float* errors);

}  // namespace lighter
