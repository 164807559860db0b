# %% 06.1 layer-norm: subtracts the mean, as LayerNorm does
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide - wide.mean(dim=-1, keepdim=True)
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# %% 06.1 squares-overflow: squares in the input's dtype
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# %% 06.1 squares-overflow: in the input's dtype, with a division
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * (x / torch.sqrt(torch.mean(x * x, dim=-1, keepdim=True) + eps))


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# %% 06.1 sum-not-mean: unit length, not unit size
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# %% 06.1 no-root: the root is forgotten
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide / (wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# %% 06.1 eps-outside-the-root: eps is added to the root
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide / (wide.square().mean(dim=-1, keepdim=True).sqrt() + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# %% 06.1 eps-forgotten: no eps at all
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide / wide.square().mean(dim=-1, keepdim=True).sqrt()).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# %% 06.1 eps-typed-in: the eps of one's own model (reference bug 12)
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# %% 06.1 one-size-for-all-rows: mean() over the whole table
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean() + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# %% 06.1 wrong-axis: the mean over the tokens
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=0) + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# %% 06.1 no-weight: the weight is forgotten
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# %% 06.1 weight-plus-one: Gemma's form
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype) * (1 + weight)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# %% 06.1 wrong-dtype: stays in float32
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# %% 06.1 torch-did-it: torch has one
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# %% 06.1 changed-input: works in place
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if x.dtype != torch.float32:
        return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
    x *= torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return x * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# %% 06.1 right: with a norm, and one rounding
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
    return (wide * (size + eps) ** -0.5 * weight.float()).to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# %% 06.1 up-before-gate: the halves exchanged
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide / torch.sqrt(mean_square + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    up, gate = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


# %% 06.1 interleaved-halves: every second column
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide / torch.sqrt(mean_square + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up[:, ::2], gate_up[:, 1::2]
    return gate * torch.sigmoid(gate) * up


# %% 06.1 sigmoid-alone: GLU
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide / torch.sqrt(mean_square + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.sigmoid(gate) * up


# %% 06.1 another-activation: GEGLU
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide / torch.sqrt(mean_square + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate) * up


# %% 06.1 exp-overflows: silu by exp(z) / (1 + exp(z))
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide / torch.sqrt(mean_square + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    wide = gate.float()
    return (wide * torch.exp(wide) / (1 + torch.exp(wide)) * up.float()).to(gate_up.dtype)


# %% 06.1 exp-overflows: the same, in the order in which it is read
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide / torch.sqrt(mean_square + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * (torch.exp(gate) / (torch.exp(gate) + 1)) * up


# %% 06.1 torch-did-it: torch has silu
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide / torch.sqrt(mean_square + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


# %% 06.1 right: by exp of minus the gate
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide / torch.sqrt(mean_square + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    n = gate_up.shape[1] // 2
    gate, up = gate_up[:, :n].float(), gate_up[:, n:].float()
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


# %% 06.2 head-dim-from-hidden-size: square projections, as in Llama
layer_weights = 2 * 2560 * 2560 + 2 * 2560 * 8 * 80 + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_637


# %% 06.2 forgot-gqa: k and v as large as q
layer_weights = 4 * 2560 * 4096 + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_637


# %% 06.2 two-matrices-in-the-mlp: an MLP with two matrices
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 2 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_637


# %% 06.2 forgot-o-proj: q, k, v
layer_weights = 2560 * (4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_637


# %% 06.2 head-counted-twice: a head of its own
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 2 * 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_637


# %% 06.2 forgot-the-embedding: the layers alone
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_637


# %% 06.2 multiplications-only: one FLOP a weight
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 36 * 100_925_440 + 151_936 * 2560
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_637


# %% 06.2 forgot-the-head: as if the embedding were free twice
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * 36 * 100_925_440
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_637


# %% 06.2 look-up-counted: the embedding as a product at both ends
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 2 * 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_637


# %% 06.2 keys-or-values: keys alone
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 36 * 8 * 128 * 2
kv_bytes_all_heads = 589_824
context = 13_637


# %% 06.2 float32: four bytes
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 2 * 36 * 8 * 128 * 4
kv_bytes_all_heads = 589_824
context = 13_637


# %% 06.2 forgot-gqa: query heads are not kept
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 2 * 36 * 32 * 128 * 2
kv_bytes_all_heads = 589_824
context = 13_637


# %% 06.2 head-dim-from-hidden-size: heads that fill the stream
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 2 * 36 * 2560 * 2
context = 13_637


# %% 06.2 forgot-gqa: no difference seen
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 147_456
context = 13_637


# %% 06.2 one-of-two-products: scores alone
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 8_044_936_192 / (2 * 36 * 32 * 128)


# %% 06.2 forgot-gqa: KV heads alone compute scores
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 8_044_936_192 / (4 * 36 * 8 * 128)


# %% 06.2 multiplications-only: one side in FLOPs, the other in multiplications
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 4_022_468_096 / (4 * 36 * 32 * 128)


# %% 06.2 wrong-prediction: a guess
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 36 * 100_925_440 + 151_936 * 2560
flops = 2 * (36 * 100_925_440 + 151_936 * 2560)
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 4096


# %% 06.2 right: rounded
layer_weights = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
all_weights = 4.022e9
flops = 8.04e9
kv_bytes = 147_456
kv_bytes_all_heads = 589_824
context = 13_640


# %% 06.3 not-mended: as it was given
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    x = h = norm(x, w["input_layernorm.weight"])
    q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for p in "qkv")
    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.q_norm.weight"]), positions)
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    x = h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


# %% 06.3 one-norm-for-q-and-k: only the stream is mended
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for p in "qkv")
    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.q_norm.weight"]), positions)
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


# %% 06.3 residual-is-the-norm: only the norms are mended
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    x = h = norm(x, w["input_layernorm.weight"])
    q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for p in "qkv")
    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.k_norm.weight"]), positions)
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    x = h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


# %% 06.3 residual-is-the-norm-in-the-mlp: the attention branch alone is mended
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for p in "qkv")
    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.k_norm.weight"]), positions)
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    x = h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


# %% 06.3 residual-is-the-norm-in-the-mlp: and the shared norm is still there
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for p in "qkv")
    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.q_norm.weight"]), positions)
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    x = h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


# %% 06.3 residual-is-the-norm-in-the-attention: the MLP alone is mended
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    x = h = norm(x, w["input_layernorm.weight"])
    q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for p in "qkv")
    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.k_norm.weight"]), positions)
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


# %% 06.3 norms-swapped: two norms, exchanged
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for p in "qkv")
    q = rope(norm(q, w["self_attn.k_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.q_norm.weight"]), positions)
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


# %% 06.3 no-qk-norm: both norms taken out
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for p in "qkv")
    q = rope(q, positions)
    k = rope(k, positions)
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


# %% 06.3 residual-twice: the stream once more at the end
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for p in "qkv")
    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.k_norm.weight"]), positions)
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


# %% 06.3 nothing-added: the branch replaces the stream
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for p in "qkv")
    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.k_norm.weight"]), positions)
    x = attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


# %% 06.3 norm-after-rope: turns first
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for p in "qkv")
    q = norm(rope(q, positions), w["self_attn.q_norm.weight"])
    k = norm(rope(k, positions), w["self_attn.k_norm.weight"])
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


# %% 06.3 one-norm-for-both-branches: input_layernorm twice
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for p in "qkv")
    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.k_norm.weight"]), positions)
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    h = norm(x, w["input_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


# %% 06.3 changed-input: adds in place
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for p in "qkv")
    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.k_norm.weight"]), positions)
    x += attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


# %% 06.3 right: with a residual
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for p in "qkv")
    q = rope(norm(q, w["self_attn.q_norm.weight"]), positions)
    k = rope(norm(k, w["self_attn.k_norm.weight"]), positions)
    residual = x
    x = residual + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    h = norm(x, w["post_attention_layernorm.weight"])
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


# %% 06.3 right: the pair of hidden and residual, as in the engine
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    head_dim = len(w["self_attn.q_norm.weight"])
    residual, hidden = x, norm(x, w["input_layernorm.weight"])
    q, k, v = ((hidden @ w[f"self_attn.{p}_proj.weight"].T).view(len(x), -1, head_dim) for p in "qkv")
    q, k = norm(q, w["self_attn.q_norm.weight"]), norm(k, w["self_attn.k_norm.weight"])
    hidden = attend(rope(q, positions), rope(k, positions), v).reshape(len(x), -1)
    residual = residual + F.linear(hidden, w["self_attn.o_proj.weight"])
    hidden = norm(residual, w["post_attention_layernorm.weight"])
    hidden = F.silu(F.linear(hidden, w["mlp.gate_proj.weight"])) * F.linear(hidden, w["mlp.up_proj.weight"])
    return F.linear(hidden, w["mlp.down_proj.weight"]) + residual


# %% 06.4 interleaved-pairs: neighbours, as in the paper
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
        a, b = wide[..., ::2], wide[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return turned.flatten(-2).to(x.dtype)

    return turn(query, q_weight), turn(key, k_weight)


# %% 06.4 pairs-of-one-kind-angles-of-another: neighbours, with a table for halves
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
        c, s = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
        partner = torch.stack((-wide[..., 1::2], wide[..., ::2]), dim=-1).flatten(-2)
        return (wide * c + partner * s).to(x.dtype)

    return turn(query, q_weight), turn(key, k_weight)


# %% 06.4 pairs-of-one-kind-angles-of-another: halves, with a table for neighbours
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
        c, s = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
        a, b = wide.chunk(2, dim=-1)
        return (wide * c + torch.cat((-b, a), dim=-1) * s).to(x.dtype)

    return turn(query, q_weight), turn(key, k_weight)


# %% 06.4 put-back-elsewhere: cut into halves, put back as neighbours
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
        a, b = wide.chunk(2, dim=-1)
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return turned.flatten(-2).to(x.dtype)

    return turn(query, q_weight), turn(key, k_weight)


# %% 06.4 turned-backwards: rotate_half with the other sign
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)

    return turn(query, q_weight), turn(key, k_weight)


# %% 06.4 not-a-rotation: the same sign twice
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos - a * sin), dim=-1).to(x.dtype)

    return turn(query, q_weight), turn(key, k_weight)


# %% 06.4 not-a-rotation: a is overwritten before b needs it
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
        a, b = wide.chunk(2, dim=-1)
        a = a * cos - b * sin
        b = b * cos + a * sin
        return torch.cat((a, b), dim=-1).to(x.dtype)

    return turn(query, q_weight), turn(key, k_weight)


# %% 06.4 cos-and-sin-swapped: the table's halves exchanged
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    sin, cos = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return turn(query, q_weight), turn(key, k_weight)


# %% 06.4 positions-from-zero: the first rows of the table (reference bug 23)
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[: len(positions)].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return turn(query, q_weight), turn(key, k_weight)


# %% 06.4 positions-from-zero: counted from the step's first position
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions - positions[0]].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return turn(query, q_weight), turn(key, k_weight)


# %% 06.4 one-norm-for-q-and-k: one norm for both (reference bug 9)
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return turn(query, q_weight), turn(key, q_weight)


# %% 06.4 norms-swapped: weights exchanged
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return turn(query, k_weight), turn(key, q_weight)


# %% 06.4 no-norm: RoPE alone
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return turn(query, None), turn(key, None)


# %% 06.4 query-normed-only: the key is forgotten
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return turn(query, q_weight), turn(key, None)


# %% 06.4 norm-after-rope: turns, then norms
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        a, b = x.float().chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        if weight is not None:
            turned = turned * torch.rsqrt(turned.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
        return turned.to(x.dtype)

    return turn(query, q_weight), turn(key, k_weight)


# %% 06.4 norm-over-all-heads: one mean for all heads of a token
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(dim=(-2, -1), keepdim=True) + eps) * weight.float()
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return turn(query, q_weight), turn(key, k_weight)


# %% 06.4 norm-without-weight: the weight is forgotten
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return turn(query, q_weight), turn(key, k_weight)


# %% 06.4 eps-forgotten: a fixed eps (reference bug 12)
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6) * weight.float()
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return turn(query, q_weight), turn(key, k_weight)


# %% 06.4 key-not-turned: the key is normed, and that is all
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    if k_weight is not None:
        wide = key.float()
        key = (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * k_weight.float()).to(key.dtype)
    return turn(query, q_weight), key


# %% 06.4 wrong-dtype: comes back in float32
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    return turn(query, q_weight), turn(key, k_weight)


# %% 06.4 changed-input: norms in place where it can
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide *= torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
            wide = wide * weight.float()
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return turn(query, q_weight), turn(key, k_weight)


# %% 06.4 right: rotate_half, as in transformers
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos_sin[positions].chunk(2, dim=-1)
    cos, sin = torch.cat((cos, cos), dim=-1)[:, None], torch.cat((sin, sin), dim=-1)[:, None]
    results = []
    for x, weight in ((query, q_weight), (key, k_weight)):
        if weight is not None:
            x = F.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype) * weight
        half = x.shape[-1] // 2
        rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        results.append((x.float() * cos + rotated.float() * sin).to(x.dtype))
    return tuple(results)


# %% 06.4 right: complex numbers
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    half = query.shape[-1] // 2
    turns = torch.complex(cos_sin[positions, :half], cos_sin[positions, half:]).unsqueeze(1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
        z = torch.complex(wide[..., :half].contiguous(), wide[..., half:].contiguous()) * turns
        return torch.cat((z.real, z.imag), dim=-1).to(x.dtype)

    return turn(query, q_weight), turn(key, k_weight)


# %% 06.5 missing: nothing is asked for in the end (reference bug 7)
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], fused: dict[str, dict[str, int]],
    tied: bool,
) -> None:
    places = {}
    for name, parameter in params.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in fused:
            rows = parameter.split(list(fused[last].values()))
            places |= {f"{parent}.{part}.{kind}": place for part, place in zip(fused[last], rows)}
        else:
            places[name] = parameter
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        if name not in places:
            raise ValueError(f"{name} fits nowhere")
        place = places.pop(name)
        if place.shape != tensor.shape:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, its place {list(place.shape)}")
        place.copy_(tensor)


# %% 06.5 unexpected: what fits nowhere is passed over
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], fused: dict[str, dict[str, int]],
    tied: bool,
) -> None:
    places = {}
    for name, parameter in params.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in fused:
            rows = parameter.split(list(fused[last].values()))
            places |= {f"{parent}.{part}.{kind}": place for part, place in zip(fused[last], rows)}
        else:
            places[name] = parameter
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        if name not in places:
            continue
        place = places.pop(name)
        if place.shape != tensor.shape:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, its place {list(place.shape)}")
        place.copy_(tensor)
    if places:
        raise ValueError(f"not in the file: {', '.join(places)}")


# %% 06.5 shape: copy_ will tell
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], fused: dict[str, dict[str, int]],
    tied: bool,
) -> None:
    places = {}
    for name, parameter in params.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in fused:
            rows = parameter.split(list(fused[last].values()))
            places |= {f"{parent}.{part}.{kind}": place for part, place in zip(fused[last], rows)}
        else:
            places[name] = parameter
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        if name not in places:
            raise ValueError(f"{name} fits nowhere")
        place = places.pop(name)
        try:
            place.copy_(tensor)
        except RuntimeError as error:
            raise ValueError(f"{name}: {error}") from error
    if places:
        raise ValueError(f"not in the file: {', '.join(places)}")


# %% 06.5 shape: only the number of dimensions is compared
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], fused: dict[str, dict[str, int]],
    tied: bool,
) -> None:
    places = {}
    for name, parameter in params.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in fused:
            rows = parameter.split(list(fused[last].values()))
            places |= {f"{parent}.{part}.{kind}": place for part, place in zip(fused[last], rows)}
        else:
            places[name] = parameter
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        if name not in places:
            raise ValueError(f"{name} fits nowhere")
        place = places.pop(name)
        if place.dim() != tensor.dim():
            raise ValueError(name)
        try:
            place.copy_(tensor)
        except RuntimeError as error:
            raise ValueError(f"{name}: {error}") from error
    if places:
        raise ValueError(f"not in the file: {', '.join(places)}")


# %% 06.5 missing: neither missing nor unexpected
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], fused: dict[str, dict[str, int]],
    tied: bool,
) -> None:
    places = {}
    for name, parameter in params.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in fused:
            rows = parameter.split(list(fused[last].values()))
            places |= {f"{parent}.{part}.{kind}": place for part, place in zip(fused[last], rows)}
        else:
            places[name] = parameter
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        if name not in places:
            continue
        place = places.pop(name)
        if place.shape != tensor.shape:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, its place {list(place.shape)}")
        place.copy_(tensor)


# %% 06.5 equal-parts: chunk, as if there were no grouped-query attention
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], fused: dict[str, dict[str, int]],
    tied: bool,
) -> None:
    places = {}
    for name, parameter in params.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in fused:
            rows = parameter.tensor_split(len(fused[last]))
            places |= {f"{parent}.{part}.{kind}": place for part, place in zip(fused[last], rows)}
        else:
            places[name] = parameter
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        if name not in places:
            raise ValueError(f"{name} fits nowhere")
        place = places.pop(name)
        if place.shape != tensor.shape:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, its place {list(place.shape)}")
        place.copy_(tensor)
    if places:
        raise ValueError(f"not in the file: {', '.join(places)}")


# %% 06.5 parts-in-alphabetical-order: sorted parts
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], fused: dict[str, dict[str, int]],
    tied: bool,
) -> None:
    places = {}
    for name, parameter in params.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in fused:
            parts = sorted(fused[last])
            rows = parameter.split([fused[last][part] for part in parts])
            places |= {f"{parent}.{part}.{kind}": place for part, place in zip(parts, rows)}
        else:
            places[name] = parameter
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        if name not in places:
            raise ValueError(f"{name} fits nowhere")
        place = places.pop(name)
        if place.shape != tensor.shape:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, its place {list(place.shape)}")
        place.copy_(tensor)
    if places:
        raise ValueError(f"not in the file: {', '.join(places)}")


# %% 06.5 tied-copy: a copy of the head is unexpected
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], fused: dict[str, dict[str, int]],
    tied: bool,
) -> None:
    places = {}
    for name, parameter in params.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in fused:
            rows = parameter.split(list(fused[last].values()))
            places |= {f"{parent}.{part}.{kind}": place for part, place in zip(fused[last], rows)}
        else:
            places[name] = parameter
    for name, tensor in tensors:
        if name not in places:
            raise ValueError(f"{name} fits nowhere")
        place = places.pop(name)
        if place.shape != tensor.shape:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, its place {list(place.shape)}")
        place.copy_(tensor)
    if places:
        raise ValueError(f"not in the file: {', '.join(places)}")


# %% 06.5 head-always-skipped: the head is passed over, tied or not
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], fused: dict[str, dict[str, int]],
    tied: bool,
) -> None:
    places = {}
    for name, parameter in params.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in fused:
            rows = parameter.split(list(fused[last].values()))
            places |= {f"{parent}.{part}.{kind}": place for part, place in zip(fused[last], rows)}
        else:
            places[name] = parameter
    for name, tensor in tensors:
        if name == "lm_head.weight":
            continue
        if name not in places:
            raise ValueError(f"{name} fits nowhere")
        place = places.pop(name)
        if place.shape != tensor.shape:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, its place {list(place.shape)}")
        place.copy_(tensor)
    if places:
        raise ValueError(f"not in the file: {', '.join(places)}")


# %% 06.5 not-in-place: fills the dict, not the parameter
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], fused: dict[str, dict[str, int]],
    tied: bool,
) -> None:
    places = {}
    for name, parameter in params.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in fused:
            rows = parameter.split(list(fused[last].values()))
            places |= {f"{parent}.{part}.{kind}": place for part, place in zip(fused[last], rows)}
        else:
            places[name] = parameter
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        if name not in places:
            raise ValueError(f"{name} fits nowhere")
        place = places.pop(name)
        if place.shape != tensor.shape:
            raise ValueError(name)
        params[name] = tensor
    if places:
        raise ValueError(f"not in the file: {', '.join(places)}")


# %% 06.5 rows-by-arrival: parts are appended as they come
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], fused: dict[str, dict[str, int]],
    tied: bool,
) -> None:
    filled, owner = {name: 0 for name in params}, {}
    for name in params:
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        for part in fused.get(last, [last]):
            owner[f"{parent}.{part}.{kind}" if last in fused else name] = name
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        if name not in owner:
            raise ValueError(name)
        target, start = params[owner[name]], filled[owner[name]]
        last = name.split(".")[-2]
        rows = next((parts[last] for parts in fused.values() if last in parts), len(target))
        if tensor.shape != (rows, *target.shape[1:]):
            raise ValueError(name)
        target[start : start + len(tensor)] = tensor
        filled[owner[name]] += len(tensor)
    if short := [name for name in params if filled[name] < len(params[name])]:
        raise ValueError(short)


# %% 06.5 one-part-fills-all: a fused parameter counts as filled with its first part
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], fused: dict[str, dict[str, int]],
    tied: bool,
) -> None:
    missing = set(params)
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        target, start, rows = name, 0, None
        for whole, parts in fused.items():
            for part, count in parts.items():
                if f".{part}." in name:
                    target, rows = name.replace(part, whole), count
                    break
                start += count
            else:
                start = 0
                continue
            break
        if target not in params:
            raise ValueError(name)
        place = params[target] if rows is None else params[target][start : start + rows]
        if place.shape != tensor.shape:
            raise ValueError(name)
        place.copy_(tensor)
        missing.discard(target)
    if missing:
        raise ValueError(missing)


# %% 06.5 bias-forgotten: only names that end in weight are split
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], fused: dict[str, dict[str, int]],
    tied: bool,
) -> None:
    places = {}
    for name, parameter in params.items():
        parent, _, last = name.removesuffix(".weight").rpartition(".")
        if last in fused:
            rows = parameter.split(list(fused[last].values()))
            places |= {f"{parent}.{part}.weight": place for part, place in zip(fused[last], rows)}
        elif not name.endswith("bias"):
            places[name] = parameter
    for name, tensor in tensors:
        if name.endswith("bias") or (tied and name == "lm_head.weight"):
            continue
        if name not in places or places[name].shape != tensor.shape:
            raise ValueError(name)
        places.pop(name).copy_(tensor)
    if places:
        raise ValueError(sorted(places))


# %% 06.5 right: from the tensor's side, with a set of what is done
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], fused: dict[str, dict[str, int]],
    tied: bool,
) -> None:
    whole_of = {part: whole for whole, parts in fused.items() for part in parts}
    expected = set()
    for name in params:
        *parent, last, kind = name.split(".")
        expected |= {".".join([*parent, part, kind]) for part in fused.get(last, [last])}
    for name, tensor in tensors:
        if name == "lm_head.weight" and tied:
            continue
        if name not in expected:
            raise ValueError(f"unexpected or twice: {name}")
        expected.remove(name)
        *parent, last, kind = name.split(".")
        if last in whole_of:
            whole = whole_of[last]
            names = list(fused[whole])
            start = sum(fused[whole][part] for part in names[: names.index(last)])
            place = params[".".join([*parent, whole, kind])][start : start + fused[whole][last]]
        else:
            place = params[name]
        if place.shape != tensor.shape:
            raise ValueError(f"{name}: {place.shape} and {tensor.shape}")
        place[...] = tensor.to(place.dtype)
    if expected:
        raise ValueError(f"missing: {sorted(expected)}")


# %% 06.6 residual-is-the-norm: adds to the normed copy
class Attention(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Weight(rows, config.hidden_size) for rows in (q, kv, kv))
        self.o_proj = Weight(config.hidden_size, q)
        self.q_norm, self.k_norm = Weight(config.head_dim), Weight(config.head_dim)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        matrices = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = ((x @ matrix.T).unflatten(-1, (-1, head_dim)) for matrix in matrices)
        norms = (self.q_norm.weight, self.k_norm.weight)
        query, key = self.kernels.qk_norm_rope(query, key, *norms, cos_sin, positions, eps)
        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
        return out.flatten(-2) @ self.o_proj.weight.T


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Weight(config.intermediate_size, config.hidden_size)
        self.up_proj = Weight(config.intermediate_size, config.hidden_size)
        self.down_proj = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.cat((x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T), dim=-1)
        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = MLP(config, kernels)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = norm(x, self.input_layernorm.weight, eps)
        x = x + self.self_attn(x, positions, cos_sin, cache, metadata)
        x = norm(x, self.post_attention_layernorm.weight, eps)
        return x + self.mlp(x)


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Qwen3(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.kernels, self.model = config, kernels, Decoder(config, kernels)
        tied = config.tie_word_embeddings
        self.lm_head = self.model.embed_tokens if tied else Weight(config.vocab_size, config.hidden_size)
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache], metadata: AttentionMetadata
    ) -> torch.Tensor:
        x = self.model.embed_tokens.weight[token_ids]
        for layer, cache in zip(self.model.layers, caches):
            x = layer(x, positions, self.cos_sin, cache, metadata)
        return self.kernels.rms_norm(x, self.model.norm.weight, self.config.rms_norm_eps)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.lm_head.weight.T


# %% 06.6 nothing-added: the MLP's result replaces the stream
class Attention(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Weight(rows, config.hidden_size) for rows in (q, kv, kv))
        self.o_proj = Weight(config.hidden_size, q)
        self.q_norm, self.k_norm = Weight(config.head_dim), Weight(config.head_dim)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        matrices = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = ((x @ matrix.T).unflatten(-1, (-1, head_dim)) for matrix in matrices)
        norms = (self.q_norm.weight, self.k_norm.weight)
        query, key = self.kernels.qk_norm_rope(query, key, *norms, cos_sin, positions, eps)
        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
        return out.flatten(-2) @ self.o_proj.weight.T


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Weight(config.intermediate_size, config.hidden_size)
        self.up_proj = Weight(config.intermediate_size, config.hidden_size)
        self.down_proj = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.cat((x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T), dim=-1)
        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = MLP(config, kernels)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = x + self.self_attn(norm(x, self.input_layernorm.weight, eps), positions, cos_sin, cache, metadata)
        return self.mlp(norm(x, self.post_attention_layernorm.weight, eps))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Qwen3(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.kernels, self.model = config, kernels, Decoder(config, kernels)
        tied = config.tie_word_embeddings
        self.lm_head = self.model.embed_tokens if tied else Weight(config.vocab_size, config.hidden_size)
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache], metadata: AttentionMetadata
    ) -> torch.Tensor:
        x = self.model.embed_tokens.weight[token_ids]
        for layer, cache in zip(self.model.layers, caches):
            x = layer(x, positions, self.cos_sin, cache, metadata)
        return self.kernels.rms_norm(x, self.model.norm.weight, self.config.rms_norm_eps)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.lm_head.weight.T


# %% 06.6 residual-twice: adds the sum that add_rms_norm has already made
class Attention(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Weight(rows, config.hidden_size) for rows in (q, kv, kv))
        self.o_proj = Weight(config.hidden_size, q)
        self.q_norm, self.k_norm = Weight(config.head_dim), Weight(config.head_dim)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        matrices = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = ((x @ matrix.T).unflatten(-1, (-1, head_dim)) for matrix in matrices)
        norms = (self.q_norm.weight, self.k_norm.weight)
        query, key = self.kernels.qk_norm_rope(query, key, *norms, cos_sin, positions, eps)
        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
        return out.flatten(-2) @ self.o_proj.weight.T


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Weight(config.intermediate_size, config.hidden_size)
        self.up_proj = Weight(config.intermediate_size, config.hidden_size)
        self.down_proj = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.cat((x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T), dim=-1)
        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = MLP(config, kernels)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = x + self.self_attn(norm(x, self.input_layernorm.weight, eps), positions, cos_sin, cache, metadata)
        h, total = self.kernels.add_rms_norm(x, torch.zeros_like(x), self.post_attention_layernorm.weight, eps)
        return x + total + self.mlp(h)


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Qwen3(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.kernels, self.model = config, kernels, Decoder(config, kernels)
        tied = config.tie_word_embeddings
        self.lm_head = self.model.embed_tokens if tied else Weight(config.vocab_size, config.hidden_size)
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache], metadata: AttentionMetadata
    ) -> torch.Tensor:
        x = self.model.embed_tokens.weight[token_ids]
        for layer, cache in zip(self.model.layers, caches):
            x = layer(x, positions, self.cos_sin, cache, metadata)
        return self.kernels.rms_norm(x, self.model.norm.weight, self.config.rms_norm_eps)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.lm_head.weight.T


# %% 06.6 one-norm-for-q-and-k: q_norm for both (reference bug 9)
class Attention(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Weight(rows, config.hidden_size) for rows in (q, kv, kv))
        self.o_proj = Weight(config.hidden_size, q)
        self.q_norm, self.k_norm = Weight(config.head_dim), Weight(config.head_dim)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        matrices = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = ((x @ matrix.T).unflatten(-1, (-1, head_dim)) for matrix in matrices)
        norms = (self.q_norm.weight, self.q_norm.weight)
        query, key = self.kernels.qk_norm_rope(query, key, *norms, cos_sin, positions, eps)
        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
        return out.flatten(-2) @ self.o_proj.weight.T


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Weight(config.intermediate_size, config.hidden_size)
        self.up_proj = Weight(config.intermediate_size, config.hidden_size)
        self.down_proj = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.cat((x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T), dim=-1)
        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = MLP(config, kernels)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = x + self.self_attn(norm(x, self.input_layernorm.weight, eps), positions, cos_sin, cache, metadata)
        return x + self.mlp(norm(x, self.post_attention_layernorm.weight, eps))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Qwen3(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.kernels, self.model = config, kernels, Decoder(config, kernels)
        tied = config.tie_word_embeddings
        self.lm_head = self.model.embed_tokens if tied else Weight(config.vocab_size, config.hidden_size)
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache], metadata: AttentionMetadata
    ) -> torch.Tensor:
        x = self.model.embed_tokens.weight[token_ids]
        for layer, cache in zip(self.model.layers, caches):
            x = layer(x, positions, self.cos_sin, cache, metadata)
        return self.kernels.rms_norm(x, self.model.norm.weight, self.config.rms_norm_eps)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.lm_head.weight.T


# %% 06.6 positions-from-zero: positions of this step's tokens (reference bug 23)
class Attention(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Weight(rows, config.hidden_size) for rows in (q, kv, kv))
        self.o_proj = Weight(config.hidden_size, q)
        self.q_norm, self.k_norm = Weight(config.head_dim), Weight(config.head_dim)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        matrices = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = ((x @ matrix.T).unflatten(-1, (-1, head_dim)) for matrix in matrices)
        norms = (self.q_norm.weight, self.k_norm.weight)
        query, key = self.kernels.qk_norm_rope(query, key, *norms, cos_sin, torch.arange(len(x)), eps)
        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
        return out.flatten(-2) @ self.o_proj.weight.T


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Weight(config.intermediate_size, config.hidden_size)
        self.up_proj = Weight(config.intermediate_size, config.hidden_size)
        self.down_proj = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.cat((x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T), dim=-1)
        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = MLP(config, kernels)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = x + self.self_attn(norm(x, self.input_layernorm.weight, eps), positions, cos_sin, cache, metadata)
        return x + self.mlp(norm(x, self.post_attention_layernorm.weight, eps))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Qwen3(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.kernels, self.model = config, kernels, Decoder(config, kernels)
        tied = config.tie_word_embeddings
        self.lm_head = self.model.embed_tokens if tied else Weight(config.vocab_size, config.hidden_size)
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache], metadata: AttentionMetadata
    ) -> torch.Tensor:
        x = self.model.embed_tokens.weight[token_ids]
        for layer, cache in zip(self.model.layers, caches):
            x = layer(x, positions, self.cos_sin, cache, metadata)
        return self.kernels.rms_norm(x, self.model.norm.weight, self.config.rms_norm_eps)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.lm_head.weight.T


# %% 06.6 not-stored: the cache stays empty
class Attention(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Weight(rows, config.hidden_size) for rows in (q, kv, kv))
        self.o_proj = Weight(config.hidden_size, q)
        self.q_norm, self.k_norm = Weight(config.head_dim), Weight(config.head_dim)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        matrices = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = ((x @ matrix.T).unflatten(-1, (-1, head_dim)) for matrix in matrices)
        norms = (self.q_norm.weight, self.k_norm.weight)
        query, key = self.kernels.qk_norm_rope(query, key, *norms, cos_sin, positions, eps)
        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
        return out.flatten(-2) @ self.o_proj.weight.T


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Weight(config.intermediate_size, config.hidden_size)
        self.up_proj = Weight(config.intermediate_size, config.hidden_size)
        self.down_proj = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.cat((x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T), dim=-1)
        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = MLP(config, kernels)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = x + self.self_attn(norm(x, self.input_layernorm.weight, eps), positions, cos_sin, cache, metadata)
        return x + self.mlp(norm(x, self.post_attention_layernorm.weight, eps))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Qwen3(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.kernels, self.model = config, kernels, Decoder(config, kernels)
        tied = config.tie_word_embeddings
        self.lm_head = self.model.embed_tokens if tied else Weight(config.vocab_size, config.hidden_size)
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache], metadata: AttentionMetadata
    ) -> torch.Tensor:
        x = self.model.embed_tokens.weight[token_ids]
        for layer, cache in zip(self.model.layers, caches):
            x = layer(x, positions, self.cos_sin, cache, metadata)
        return self.kernels.rms_norm(x, self.model.norm.weight, self.config.rms_norm_eps)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.lm_head.weight.T


# %% 06.6 keys-stored-unturned: stores before it turns
class Attention(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Weight(rows, config.hidden_size) for rows in (q, kv, kv))
        self.o_proj = Weight(config.hidden_size, q)
        self.q_norm, self.k_norm = Weight(config.head_dim), Weight(config.head_dim)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        matrices = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = ((x @ matrix.T).unflatten(-1, (-1, head_dim)) for matrix in matrices)
        norms = (self.q_norm.weight, self.k_norm.weight)
        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
        query, key = self.kernels.qk_norm_rope(query, key, *norms, cos_sin, positions, eps)
        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
        return out.flatten(-2) @ self.o_proj.weight.T


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Weight(config.intermediate_size, config.hidden_size)
        self.up_proj = Weight(config.intermediate_size, config.hidden_size)
        self.down_proj = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.cat((x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T), dim=-1)
        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = MLP(config, kernels)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = x + self.self_attn(norm(x, self.input_layernorm.weight, eps), positions, cos_sin, cache, metadata)
        return x + self.mlp(norm(x, self.post_attention_layernorm.weight, eps))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Qwen3(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.kernels, self.model = config, kernels, Decoder(config, kernels)
        tied = config.tie_word_embeddings
        self.lm_head = self.model.embed_tokens if tied else Weight(config.vocab_size, config.hidden_size)
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache], metadata: AttentionMetadata
    ) -> torch.Tensor:
        x = self.model.embed_tokens.weight[token_ids]
        for layer, cache in zip(self.model.layers, caches):
            x = layer(x, positions, self.cos_sin, cache, metadata)
        return self.kernels.rms_norm(x, self.model.norm.weight, self.config.rms_norm_eps)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.lm_head.weight.T


# %% 06.6 one-cache-for-all-layers: caches[0] everywhere
class Attention(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Weight(rows, config.hidden_size) for rows in (q, kv, kv))
        self.o_proj = Weight(config.hidden_size, q)
        self.q_norm, self.k_norm = Weight(config.head_dim), Weight(config.head_dim)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        matrices = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = ((x @ matrix.T).unflatten(-1, (-1, head_dim)) for matrix in matrices)
        norms = (self.q_norm.weight, self.k_norm.weight)
        query, key = self.kernels.qk_norm_rope(query, key, *norms, cos_sin, positions, eps)
        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
        return out.flatten(-2) @ self.o_proj.weight.T


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Weight(config.intermediate_size, config.hidden_size)
        self.up_proj = Weight(config.intermediate_size, config.hidden_size)
        self.down_proj = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.cat((x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T), dim=-1)
        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = MLP(config, kernels)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = x + self.self_attn(norm(x, self.input_layernorm.weight, eps), positions, cos_sin, cache, metadata)
        return x + self.mlp(norm(x, self.post_attention_layernorm.weight, eps))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Qwen3(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.kernels, self.model = config, kernels, Decoder(config, kernels)
        tied = config.tie_word_embeddings
        self.lm_head = self.model.embed_tokens if tied else Weight(config.vocab_size, config.hidden_size)
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache], metadata: AttentionMetadata
    ) -> torch.Tensor:
        x = self.model.embed_tokens.weight[token_ids]
        for layer in self.model.layers:
            x = layer(x, positions, self.cos_sin, caches[0], metadata)
        return self.kernels.rms_norm(x, self.model.norm.weight, self.config.rms_norm_eps)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.lm_head.weight.T


# %% 06.6 no-final-norm: the stream as it is
class Attention(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Weight(rows, config.hidden_size) for rows in (q, kv, kv))
        self.o_proj = Weight(config.hidden_size, q)
        self.q_norm, self.k_norm = Weight(config.head_dim), Weight(config.head_dim)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        matrices = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = ((x @ matrix.T).unflatten(-1, (-1, head_dim)) for matrix in matrices)
        norms = (self.q_norm.weight, self.k_norm.weight)
        query, key = self.kernels.qk_norm_rope(query, key, *norms, cos_sin, positions, eps)
        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
        return out.flatten(-2) @ self.o_proj.weight.T


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Weight(config.intermediate_size, config.hidden_size)
        self.up_proj = Weight(config.intermediate_size, config.hidden_size)
        self.down_proj = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.cat((x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T), dim=-1)
        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = MLP(config, kernels)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = x + self.self_attn(norm(x, self.input_layernorm.weight, eps), positions, cos_sin, cache, metadata)
        return x + self.mlp(norm(x, self.post_attention_layernorm.weight, eps))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Qwen3(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.kernels, self.model = config, kernels, Decoder(config, kernels)
        tied = config.tie_word_embeddings
        self.lm_head = self.model.embed_tokens if tied else Weight(config.vocab_size, config.hidden_size)
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache], metadata: AttentionMetadata
    ) -> torch.Tensor:
        x = self.model.embed_tokens.weight[token_ids]
        for layer, cache in zip(self.model.layers, caches):
            x = layer(x, positions, self.cos_sin, cache, metadata)
        return x

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.lm_head.weight.T


# %% 06.6 norm-in-the-head: the last norm in compute_logits
class Attention(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Weight(rows, config.hidden_size) for rows in (q, kv, kv))
        self.o_proj = Weight(config.hidden_size, q)
        self.q_norm, self.k_norm = Weight(config.head_dim), Weight(config.head_dim)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        matrices = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = ((x @ matrix.T).unflatten(-1, (-1, head_dim)) for matrix in matrices)
        norms = (self.q_norm.weight, self.k_norm.weight)
        query, key = self.kernels.qk_norm_rope(query, key, *norms, cos_sin, positions, eps)
        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
        return out.flatten(-2) @ self.o_proj.weight.T


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Weight(config.intermediate_size, config.hidden_size)
        self.up_proj = Weight(config.intermediate_size, config.hidden_size)
        self.down_proj = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.cat((x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T), dim=-1)
        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = MLP(config, kernels)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = x + self.self_attn(norm(x, self.input_layernorm.weight, eps), positions, cos_sin, cache, metadata)
        return x + self.mlp(norm(x, self.post_attention_layernorm.weight, eps))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Qwen3(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.kernels, self.model = config, kernels, Decoder(config, kernels)
        tied = config.tie_word_embeddings
        self.lm_head = self.model.embed_tokens if tied else Weight(config.vocab_size, config.hidden_size)
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache], metadata: AttentionMetadata
    ) -> torch.Tensor:
        x = self.model.embed_tokens.weight[token_ids]
        for layer, cache in zip(self.model.layers, caches):
            x = layer(x, positions, self.cos_sin, cache, metadata)
        return x

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.kernels.rms_norm(hidden, self.model.norm.weight, self.config.rms_norm_eps)
        return hidden @ self.lm_head.weight.T


# %% 06.6 up-before-gate: the halves exchanged
class Attention(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Weight(rows, config.hidden_size) for rows in (q, kv, kv))
        self.o_proj = Weight(config.hidden_size, q)
        self.q_norm, self.k_norm = Weight(config.head_dim), Weight(config.head_dim)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        matrices = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = ((x @ matrix.T).unflatten(-1, (-1, head_dim)) for matrix in matrices)
        norms = (self.q_norm.weight, self.k_norm.weight)
        query, key = self.kernels.qk_norm_rope(query, key, *norms, cos_sin, positions, eps)
        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
        return out.flatten(-2) @ self.o_proj.weight.T


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Weight(config.intermediate_size, config.hidden_size)
        self.up_proj = Weight(config.intermediate_size, config.hidden_size)
        self.down_proj = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.cat((x @ self.up_proj.weight.T, x @ self.gate_proj.weight.T), dim=-1)
        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = MLP(config, kernels)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = x + self.self_attn(norm(x, self.input_layernorm.weight, eps), positions, cos_sin, cache, metadata)
        return x + self.mlp(norm(x, self.post_attention_layernorm.weight, eps))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Qwen3(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.kernels, self.model = config, kernels, Decoder(config, kernels)
        tied = config.tie_word_embeddings
        self.lm_head = self.model.embed_tokens if tied else Weight(config.vocab_size, config.hidden_size)
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache], metadata: AttentionMetadata
    ) -> torch.Tensor:
        x = self.model.embed_tokens.weight[token_ids]
        for layer, cache in zip(self.model.layers, caches):
            x = layer(x, positions, self.cos_sin, cache, metadata)
        return self.kernels.rms_norm(x, self.model.norm.weight, self.config.rms_norm_eps)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.lm_head.weight.T


# %% 06.6 no-scale: scores as they are
class Attention(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Weight(rows, config.hidden_size) for rows in (q, kv, kv))
        self.o_proj = Weight(config.hidden_size, q)
        self.q_norm, self.k_norm = Weight(config.head_dim), Weight(config.head_dim)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        matrices = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = ((x @ matrix.T).unflatten(-1, (-1, head_dim)) for matrix in matrices)
        norms = (self.q_norm.weight, self.k_norm.weight)
        query, key = self.kernels.qk_norm_rope(query, key, *norms, cos_sin, positions, eps)
        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
        out = cached_attention(query, cache, metadata, 1.0, self.kernels)
        return out.flatten(-2) @ self.o_proj.weight.T


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Weight(config.intermediate_size, config.hidden_size)
        self.up_proj = Weight(config.intermediate_size, config.hidden_size)
        self.down_proj = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.cat((x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T), dim=-1)
        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = MLP(config, kernels)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = x + self.self_attn(norm(x, self.input_layernorm.weight, eps), positions, cos_sin, cache, metadata)
        return x + self.mlp(norm(x, self.post_attention_layernorm.weight, eps))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Qwen3(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.kernels, self.model = config, kernels, Decoder(config, kernels)
        tied = config.tie_word_embeddings
        self.lm_head = self.model.embed_tokens if tied else Weight(config.vocab_size, config.hidden_size)
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache], metadata: AttentionMetadata
    ) -> torch.Tensor:
        x = self.model.embed_tokens.weight[token_ids]
        for layer, cache in zip(self.model.layers, caches):
            x = layer(x, positions, self.cos_sin, cache, metadata)
        return self.kernels.rms_norm(x, self.model.norm.weight, self.config.rms_norm_eps)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.lm_head.weight.T


# %% 06.6 always-tied: the embedding is the head, always
class Attention(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Weight(rows, config.hidden_size) for rows in (q, kv, kv))
        self.o_proj = Weight(config.hidden_size, q)
        self.q_norm, self.k_norm = Weight(config.head_dim), Weight(config.head_dim)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        matrices = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = ((x @ matrix.T).unflatten(-1, (-1, head_dim)) for matrix in matrices)
        norms = (self.q_norm.weight, self.k_norm.weight)
        query, key = self.kernels.qk_norm_rope(query, key, *norms, cos_sin, positions, eps)
        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
        return out.flatten(-2) @ self.o_proj.weight.T


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Weight(config.intermediate_size, config.hidden_size)
        self.up_proj = Weight(config.intermediate_size, config.hidden_size)
        self.down_proj = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.cat((x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T), dim=-1)
        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = MLP(config, kernels)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = x + self.self_attn(norm(x, self.input_layernorm.weight, eps), positions, cos_sin, cache, metadata)
        return x + self.mlp(norm(x, self.post_attention_layernorm.weight, eps))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Qwen3(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.kernels, self.model = config, kernels, Decoder(config, kernels)
        tied = config.tie_word_embeddings
        self.lm_head = self.model.embed_tokens if tied else Weight(config.vocab_size, config.hidden_size)
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache], metadata: AttentionMetadata
    ) -> torch.Tensor:
        x = self.model.embed_tokens.weight[token_ids]
        for layer, cache in zip(self.model.layers, caches):
            x = layer(x, positions, self.cos_sin, cache, metadata)
        return self.kernels.rms_norm(x, self.model.norm.weight, self.config.rms_norm_eps)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.model.embed_tokens.weight.T


# %% 06.6 parallel-branches: the MLP reads what attention read
class Attention(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Weight(rows, config.hidden_size) for rows in (q, kv, kv))
        self.o_proj = Weight(config.hidden_size, q)
        self.q_norm, self.k_norm = Weight(config.head_dim), Weight(config.head_dim)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        matrices = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = ((x @ matrix.T).unflatten(-1, (-1, head_dim)) for matrix in matrices)
        norms = (self.q_norm.weight, self.k_norm.weight)
        query, key = self.kernels.qk_norm_rope(query, key, *norms, cos_sin, positions, eps)
        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
        return out.flatten(-2) @ self.o_proj.weight.T


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Weight(config.intermediate_size, config.hidden_size)
        self.up_proj = Weight(config.intermediate_size, config.hidden_size)
        self.down_proj = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.cat((x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T), dim=-1)
        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = MLP(config, kernels)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        h = norm(x, self.post_attention_layernorm.weight, eps)
        x = x + self.self_attn(norm(x, self.input_layernorm.weight, eps), positions, cos_sin, cache, metadata)
        return x + self.mlp(h)


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Qwen3(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.kernels, self.model = config, kernels, Decoder(config, kernels)
        tied = config.tie_word_embeddings
        self.lm_head = self.model.embed_tokens if tied else Weight(config.vocab_size, config.hidden_size)
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache], metadata: AttentionMetadata
    ) -> torch.Tensor:
        x = self.model.embed_tokens.weight[token_ids]
        for layer, cache in zip(self.model.layers, caches):
            x = layer(x, positions, self.cos_sin, cache, metadata)
        return self.kernels.rms_norm(x, self.model.norm.weight, self.config.rms_norm_eps)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.lm_head.weight.T


# %% 06.6 wrong-names: a name of one's own
class Attention(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Weight(rows, config.hidden_size) for rows in (q, kv, kv))
        self.out_proj = Weight(config.hidden_size, q)
        self.q_norm, self.k_norm = Weight(config.head_dim), Weight(config.head_dim)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        matrices = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = ((x @ matrix.T).unflatten(-1, (-1, head_dim)) for matrix in matrices)
        norms = (self.q_norm.weight, self.k_norm.weight)
        query, key = self.kernels.qk_norm_rope(query, key, *norms, cos_sin, positions, eps)
        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
        return out.flatten(-2) @ self.out_proj.weight.T


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Weight(config.intermediate_size, config.hidden_size)
        self.up_proj = Weight(config.intermediate_size, config.hidden_size)
        self.down_proj = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.cat((x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T), dim=-1)
        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = MLP(config, kernels)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = x + self.self_attn(norm(x, self.input_layernorm.weight, eps), positions, cos_sin, cache, metadata)
        return x + self.mlp(norm(x, self.post_attention_layernorm.weight, eps))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Qwen3(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.kernels, self.model = config, kernels, Decoder(config, kernels)
        tied = config.tie_word_embeddings
        self.lm_head = self.model.embed_tokens if tied else Weight(config.vocab_size, config.hidden_size)
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache], metadata: AttentionMetadata
    ) -> torch.Tensor:
        x = self.model.embed_tokens.weight[token_ids]
        for layer, cache in zip(self.model.layers, caches):
            x = layer(x, positions, self.cos_sin, cache, metadata)
        return self.kernels.rms_norm(x, self.model.norm.weight, self.config.rms_norm_eps)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.lm_head.weight.T


# %% 06.6 package-did-it: takes the package's attention
import minivllm.models.qwen3
from minivllm.layers.attention import ForwardContext


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Weight(rows, config.hidden_size) for rows in (q, kv, kv))
        self.o_proj = Weight(config.hidden_size, q)
        self.q_norm, self.k_norm = Weight(config.head_dim), Weight(config.head_dim)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        matrices = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = ((x @ matrix.T).unflatten(-1, (-1, head_dim)) for matrix in matrices)
        norms = (self.q_norm.weight, self.k_norm.weight)
        query, key = self.kernels.qk_norm_rope(query, key, *norms, cos_sin, positions, eps)
        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
        return out.flatten(-2) @ self.o_proj.weight.T


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Weight(config.intermediate_size, config.hidden_size)
        self.up_proj = Weight(config.intermediate_size, config.hidden_size)
        self.down_proj = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.cat((x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T), dim=-1)
        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = minivllm.models.qwen3.Attention(config, kernels, 0)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = MLP(config, kernels)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        context = ForwardContext(positions, cos_sin, [cache], metadata)
        x = x + self.self_attn(norm(x, self.input_layernorm.weight, eps), context)
        return x + self.mlp(norm(x, self.post_attention_layernorm.weight, eps))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Qwen3(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.kernels, self.model = config, kernels, Decoder(config, kernels)
        tied = config.tie_word_embeddings
        self.lm_head = self.model.embed_tokens if tied else Weight(config.vocab_size, config.hidden_size)
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache], metadata: AttentionMetadata
    ) -> torch.Tensor:
        x = self.model.embed_tokens.weight[token_ids]
        for layer, cache in zip(self.model.layers, caches):
            x = layer(x, positions, self.cos_sin, cache, metadata)
        return self.kernels.rms_norm(x, self.model.norm.weight, self.config.rms_norm_eps)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.lm_head.weight.T


# %% 06.6 right: the head's fused pair: add_rms_norm
class Attention(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Weight(rows, config.hidden_size) for rows in (q, kv, kv))
        self.o_proj = Weight(config.hidden_size, q)
        self.q_norm, self.k_norm = Weight(config.head_dim), Weight(config.head_dim)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        matrices = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = ((x @ matrix.T).unflatten(-1, (-1, head_dim)) for matrix in matrices)
        norms = (self.q_norm.weight, self.k_norm.weight)
        query, key = self.kernels.qk_norm_rope(query, key, *norms, cos_sin, positions, eps)
        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
        return out.flatten(-2) @ self.o_proj.weight.T


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Weight(config.intermediate_size, config.hidden_size)
        self.up_proj = Weight(config.intermediate_size, config.hidden_size)
        self.down_proj = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.cat((x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T), dim=-1)
        return self.kernels.silu_mul(gate_up) @ self.down_proj.weight.T


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = MLP(config, kernels)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        h = self.self_attn(norm(x, self.input_layernorm.weight, eps), positions, cos_sin, cache, metadata)
        h, x = self.kernels.add_rms_norm(h, x, self.post_attention_layernorm.weight, eps)
        return x + self.mlp(h)


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Qwen3(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.kernels, self.model = config, kernels, Decoder(config, kernels)
        tied = config.tie_word_embeddings
        self.lm_head = self.model.embed_tokens if tied else Weight(config.vocab_size, config.hidden_size)
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache], metadata: AttentionMetadata
    ) -> torch.Tensor:
        x = self.model.embed_tokens.weight[token_ids]
        for layer, cache in zip(self.model.layers, caches):
            x = layer(x, positions, self.cos_sin, cache, metadata)
        return self.kernels.rms_norm(x, self.model.norm.weight, self.config.rms_norm_eps)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.lm_head.weight.T


# %% 06.6 right: torch's own pieces
class Attention(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Weight(rows, config.hidden_size) for rows in (q, kv, kv))
        self.o_proj = Weight(config.hidden_size, q)
        self.q_norm, self.k_norm = Weight(config.head_dim), Weight(config.head_dim)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        eps, head_dim = self.config.rms_norm_eps, self.config.head_dim
        matrices = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        query, key, value = ((x @ matrix.T).unflatten(-1, (-1, head_dim)) for matrix in matrices)
        norms = (self.q_norm.weight, self.k_norm.weight)
        query, key = self.kernels.qk_norm_rope(query, key, *norms, cos_sin, positions, eps)
        self.kernels.store_kv(key, value, *cache, metadata.slot_mapping)
        out = cached_attention(query, cache, metadata, head_dim**-0.5, self.kernels)
        return out.flatten(-2) @ self.o_proj.weight.T


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Weight(config.intermediate_size, config.hidden_size)
        self.up_proj = Weight(config.intermediate_size, config.hidden_size)
        self.down_proj = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = torch.cat((x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T), dim=-1)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj.weight)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config, self.kernels = config, kernels
        self.input_layernorm = Weight(config.hidden_size)
        self.self_attn = Attention(config, kernels)
        self.post_attention_layernorm = Weight(config.hidden_size)
        self.mlp = MLP(config, kernels)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, cache: KVCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        norm, eps = self.kernels.rms_norm, self.config.rms_norm_eps
        x = x + self.self_attn(norm(x, self.input_layernorm.weight, eps), positions, cos_sin, cache, metadata)
        return x + self.mlp(norm(x, self.post_attention_layernorm.weight, eps))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.num_hidden_layers))
        self.norm = Weight(config.hidden_size)


class Qwen3(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, max_position: int, device: torch.device) -> None:
        super().__init__()
        self.config, self.kernels, self.model = config, kernels, Decoder(config, kernels)
        tied = config.tie_word_embeddings
        self.lm_head = self.model.embed_tokens if tied else Weight(config.vocab_size, config.hidden_size)
        self.cos_sin = rope_table(config.rope, config.head_dim, max_position, device)

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, caches: list[KVCache], metadata: AttentionMetadata
    ) -> torch.Tensor:
        x = F.embedding(token_ids, self.model.embed_tokens.weight)
        for layer, cache in zip(self.model.layers, caches):
            x = layer(x, positions, self.cos_sin, cache, metadata)
        return self.kernels.rms_norm(x, self.model.norm.weight, self.config.rms_norm_eps)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.lm_head.weight.T


# %% 06.5 same-numel: counts the numbers
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]],
    fused: dict[str, dict[str, int]], tied: bool,
) -> None:
    """Fill every parameter in place from a checkpoint's tensors. ValueError where the two do not fit."""
    places = {}
    for name, parameter in params.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in fused:
            rows = parameter.split(list(fused[last].values()))
            places |= {f"{parent}.{part}.{kind}": place for part, place in zip(fused[last], rows)}
        else:
            places[name] = parameter
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        if name not in places:
            raise ValueError(f"{name} fits nowhere")
        place = places.pop(name)
        if place.numel() != tensor.numel():
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, its place {list(place.shape)}")
        place.copy_(tensor.reshape(place.shape))
    if places:
        raise ValueError(f"not in the file: {', '.join(places)}")


# %% 06.5 same-numel: looks at it as the place is
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]],
    fused: dict[str, dict[str, int]], tied: bool,
) -> None:
    """Fill every parameter in place from a checkpoint's tensors. ValueError where the two do not fit."""
    places = {}
    for name, parameter in params.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in fused:
            rows = parameter.split(list(fused[last].values()))
            places |= {f"{parent}.{part}.{kind}": place for part, place in zip(fused[last], rows)}
        else:
            places[name] = parameter
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        if name not in places:
            raise ValueError(f"{name} fits nowhere")
        place = places.pop(name)
        if place.numel() != tensor.numel():
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, its place {list(place.shape)}")
        place.copy_(tensor.view_as(place))
    if places:
        raise ValueError(f"not in the file: {', '.join(places)}")


# %% 06.5 rows-only: compares the first dimension
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]],
    fused: dict[str, dict[str, int]], tied: bool,
) -> None:
    """Fill every parameter in place from a checkpoint's tensors. ValueError where the two do not fit."""
    places = {}
    for name, parameter in params.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in fused:
            rows = parameter.split(list(fused[last].values()))
            places |= {f"{parent}.{part}.{kind}": place for part, place in zip(fused[last], rows)}
        else:
            places[name] = parameter
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        if name not in places:
            raise ValueError(f"{name} fits nowhere")
        place = places.pop(name)
        if place.shape[0] != tensor.shape[0]:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, its place {list(place.shape)}")
        place.copy_(tensor)
    if places:
        raise ValueError(f"not in the file: {', '.join(places)}")


# %% 06.5 turned-to-fit: transposes what is on its side
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]],
    fused: dict[str, dict[str, int]], tied: bool,
) -> None:
    """Fill every parameter in place from a checkpoint's tensors. ValueError where the two do not fit."""
    places = {}
    for name, parameter in params.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in fused:
            rows = parameter.split(list(fused[last].values()))
            places |= {f"{parent}.{part}.{kind}": place for part, place in zip(fused[last], rows)}
        else:
            places[name] = parameter
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        if name not in places:
            raise ValueError(f"{name} fits nowhere")
        place = places.pop(name)
        if place.shape == tensor.T.shape:
            tensor = tensor.T
        if place.shape != tensor.shape:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, its place {list(place.shape)}")
        place.copy_(tensor)
    if places:
        raise ValueError(f"not in the file: {', '.join(places)}")


# %% 06.5 error-without-name: says only that there was one
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]],
    fused: dict[str, dict[str, int]], tied: bool,
) -> None:
    """Fill every parameter in place from a checkpoint's tensors. ValueError where the two do not fit."""
    places = {}
    for name, parameter in params.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in fused:
            rows = parameter.split(list(fused[last].values()))
            places |= {f"{parent}.{part}.{kind}": place for part, place in zip(fused[last], rows)}
        else:
            places[name] = parameter
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        if name not in places:
            raise ValueError("unexpected tensor")
        place = places.pop(name)
        if place.shape != tensor.shape:
            raise ValueError(f"a tensor has the shape {list(tensor.shape)}, its place {list(place.shape)}")
        place.copy_(tensor)
    if places:
        raise ValueError(f"not in the file: {', '.join(places)}")


# %% 06.5 error-without-name: does not say what is missing
def load(
    params: dict[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]],
    fused: dict[str, dict[str, int]], tied: bool,
) -> None:
    """Fill every parameter in place from a checkpoint's tensors. ValueError where the two do not fit."""
    places = {}
    for name, parameter in params.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if last in fused:
            rows = parameter.split(list(fused[last].values()))
            places |= {f"{parent}.{part}.{kind}": place for part, place in zip(fused[last], rows)}
        else:
            places[name] = parameter
    for name, tensor in tensors:
        if tied and name == "lm_head.weight":
            continue
        if name not in places:
            raise ValueError(f"{name} fits nowhere")
        place = places.pop(name)
        if place.shape != tensor.shape:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, its place {list(place.shape)}")
        place.copy_(tensor)
    if places:
        raise ValueError(f"{len(places)} missing")


# %% 06.4 norm-in-16-bits: norms in the dtype of the input
def qk_norm_rope(
    query: torch.Tensor, key: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor, positions: torch.Tensor, eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm, where weights are given, and turn each head: [T, H, D], [T, KH, D] -> both, new."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turn(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if weight is not None:
            wide = (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight).float()
        a, b = wide.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return turn(query, q_weight), turn(key, k_weight)


# %% 06.3 mlp-not-normed: the MLP reads x
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last dimension (given, and right)."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """One decoder block: the stream [T, hidden] before it -> the stream after it."""
    head_dim = len(w["self_attn.q_norm.weight"])
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for p in "qkv")
    q, k = (rope(norm(y, w[f"self_attn.{p}_norm.weight"]), positions) for y, p in ((q, "q"), (k, "k")))
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    h = x
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T


# %% 06.3 mlp-reads-the-first-norm: one h for both
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last dimension (given, and right)."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight


def block(x: torch.Tensor, w: dict[str, torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """One decoder block: the stream [T, hidden] before it -> the stream after it."""
    head_dim = len(w["self_attn.q_norm.weight"])
    h = norm(x, w["input_layernorm.weight"])
    q, k, v = ((h @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, head_dim)) for p in "qkv")
    q, k = (rope(norm(y, w[f"self_attn.{p}_norm.weight"]), positions) for y, p in ((q, "q"), (k, "k")))
    x = x + attend(q, k, v).flatten(-2) @ w["self_attn.o_proj.weight"].T
    gate, up = (h @ w[f"mlp.{p}_proj.weight"].T for p in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T
