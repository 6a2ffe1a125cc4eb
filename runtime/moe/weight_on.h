#pragma once

namespace lighter {

// Where a token's routing weight goes: Llama 4 scales what enters the expert, others what leaves it.
enum class WeightOn { input, output };

}  // namespace lighter
