//! Descriptions of models without files: the released shapes, and any other, with the tensor types that the
//! usual quantisation mixes choose. For plans, compilations and benches, which read no weights.

use crate::{
    Attention, AttentionShape, Block, DeltaNet, DeltaNetShape, Embed, Ffn, FfnShape, Head, HeadOrder, HeadShape,
    Linear, Model, Moe, MoeShape, Rope, RopeScaling, RopeStyle, SharedExpert, Tensor, TensorType, Weight,
};
use std::collections::BTreeMap;

/// Hyperparameters that matter to a plan.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Shape {
    pub name: &'static str,
    pub n_embd: usize,
    pub n_layers: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    pub n_ff: usize,
    /// V heads of the delta net; 0: every layer is attention.
    pub n_v_heads: usize,
    /// K heads of the delta net, and the width of its heads.
    pub delta: (usize, usize),
    /// Every so many layers one is attention.
    pub interval: usize,
    /// Routed experts, experts per token, hidden width; 0: dense. The shared expert is as wide.
    pub experts: (usize, usize, usize),
    pub n_vocab: usize,
    pub tied: bool,
}

const fn hybrid(
    name: &'static str,
    n_embd: usize,
    n_layers: usize,
    heads: (usize, usize),
    n_ff: usize,
    n_v_heads: usize,
    experts: (usize, usize, usize),
    tied: bool,
) -> Shape {
    Shape {
        name,
        n_embd,
        n_layers,
        n_heads: heads.0,
        n_kv_heads: heads.1,
        head_dim: 256,
        n_ff,
        n_v_heads,
        delta: (16, 128),
        interval: 4,
        experts,
        n_vocab: 248_320,
        tied,
    }
}

/// Dense hybrids of delta net and attention.
pub const QWEN35_0_8B: Shape = hybrid("0.8B", 1024, 24, (8, 2), 3584, 16, (0, 0, 0), true);
/// As above.
pub const QWEN35_4B: Shape = hybrid("4B", 2560, 32, (16, 4), 9216, 32, (0, 0, 0), true);
/// As above.
pub const QWEN35_9B: Shape = hybrid("9B", 4096, 32, (16, 4), 12288, 32, (0, 0, 0), false);
/// As above.
pub const QWEN35_27B: Shape = hybrid("27B", 5120, 64, (24, 4), 17408, 48, (0, 0, 0), false);
/// The same with experts.
pub const QWEN35_35B: Shape = hybrid("35B-A3B", 2048, 40, (16, 2), 0, 32, (256, 8, 512), false);
/// As above.
pub const QWEN35_122B: Shape = hybrid("122B-A10B", 3072, 48, (32, 2), 0, 64, (256, 8, 1024), false);
/// A dense model with attention in every layer.
pub const QWEN3_8B: Shape = Shape {
    name: "qwen3 8B",
    n_embd: 4096,
    n_layers: 36,
    n_heads: 32,
    n_kv_heads: 8,
    head_dim: 128,
    n_ff: 12288,
    n_v_heads: 0,
    delta: (0, 0),
    interval: 1,
    experts: (0, 0, 0),
    n_vocab: 151_936,
    tied: false,
};

/// All of these.
pub const RELEASED: [&Shape; 7] =
    [&QWEN35_0_8B, &QWEN35_4B, &QWEN35_9B, &QWEN35_27B, &QWEN35_35B, &QWEN35_122B, &QWEN3_8B];

/// Which types the weights get.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mix {
    /// Q4_K, with Q6_K for the head and in part of the layers.
    Q4KM,
    /// Every matrix of one type.
    All(TensorType),
}

/// Hands out tensors.
struct Maker {
    mix: Mix,
    n_layers: usize,
    n_tensors: usize,
}

impl Maker {
    fn tensor(&mut self, name: String, ty: TensorType, n_rows: usize, n_cols: usize) -> Weight {
        self.n_tensors += 1;
        Weight::new(name, self.n_tensors - 1, ty, n_rows, n_cols)
    }

    fn vector(&mut self, name: String, n: usize) -> Weight {
        self.tensor(name, TensorType::F32, 1, n)
    }

    /// A projection of layer `layer`; `better`: one of those that get more bits in part of the layers.
    fn linear(&mut self, layer: usize, name: &str, n_rows: usize, n_cols: usize, better: bool) -> Linear<Weight> {
        let n = self.n_layers;
        let more = layer < n / 8 || layer >= 7 * n / 8 || (layer - n / 8) % 3 == 2;
        let wanted = match self.mix {
            Mix::Q4KM if better && more => TensorType::Q6_K,
            Mix::Q4KM => TensorType::Q4_K,
            Mix::All(ty) => ty,
        };
        let weight = self.tensor(format!("blk.{layer}.{name}.weight"), fallback(wanted, n_cols), n_rows, n_cols);
        Linear { weight, scale: None, bias: None }
    }
}

/// What a type becomes where rows are not whole blocks.
fn fallback(ty: TensorType, n_cols: usize) -> TensorType {
    let fits = |ty: TensorType| n_cols.is_multiple_of(ty.row().block_len);
    let smaller = match ty {
        TensorType::Q4_K => TensorType::Q5_0,
        TensorType::Q6_K => TensorType::Q8_0,
        _ => TensorType::F16,
    };
    [ty, smaller, TensorType::F16].into_iter().find(|ty| fits(*ty)).expect("F16 fits any row")
}

fn attention(m: &mut Maker, s: &Shape, layer: usize) -> Block<Weight> {
    let (q, kv) = (s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim);
    let gated = s.n_v_heads > 0;
    Block::Attention(Attention {
        layer,
        shape: AttentionShape {
            n_embd: s.n_embd,
            n_heads: s.n_heads,
            n_kv_heads: s.n_kv_heads,
            head_dim: s.head_dim,
            gated,
            rms_eps: 1e-6,
            rope: Rope {
                n_rot: if gated { (s.head_dim / 8 * 2).max(2) } else { s.head_dim },
                base: 1e7,
                style: RopeStyle::Neox,
                scaling: RopeScaling::None,
                rotated_pairs: Vec::new(),
            },
        },
        attn_norm: m.vector(format!("blk.{layer}.attn_norm.weight"), s.n_embd),
        attn_q: m.linear(layer, "attn_q", if gated { 2 * q } else { q }, s.n_embd, false),
        attn_k: m.linear(layer, "attn_k", kv, s.n_embd, false),
        attn_v: m.linear(layer, "attn_v", kv, s.n_embd, true),
        attn_q_norm: Some(m.vector(format!("blk.{layer}.attn_q_norm.weight"), s.head_dim)),
        attn_k_norm: Some(m.vector(format!("blk.{layer}.attn_k_norm.weight"), s.head_dim)),
        rope_freqs: None,
        attn_output: m.linear(layer, "attn_output", s.n_embd, q, false),
    })
}

fn delta_net(m: &mut Maker, s: &Shape, layer: usize) -> Block<Weight> {
    let shape = DeltaNetShape {
        n_embd: s.n_embd,
        n_k_heads: s.delta.0,
        n_v_heads: s.n_v_heads,
        head_dim: s.delta.1,
        conv_kernel: 4,
        head_order: HeadOrder::Tiled,
        rms_eps: 1e-6,
    };
    let (channels, value) = (shape.n_channels(), shape.n_value());
    Block::DeltaNet(DeltaNet {
        layer,
        attn_norm: m.vector(format!("blk.{layer}.attn_norm.weight"), s.n_embd),
        attn_qkv: m.linear(layer, "attn_qkv", channels, s.n_embd, true),
        attn_gate: m.linear(layer, "attn_gate", value, s.n_embd, false),
        ssm_conv1d: m.tensor(format!("blk.{layer}.ssm_conv1d.weight"), TensorType::F32, channels, 4),
        ssm_dt: m.vector(format!("blk.{layer}.ssm_dt.bias"), s.n_v_heads),
        ssm_a: m.vector(format!("blk.{layer}.ssm_a"), s.n_v_heads),
        ssm_beta: m.linear(layer, "ssm_beta", s.n_v_heads, s.n_embd, false),
        ssm_alpha: m.linear(layer, "ssm_alpha", s.n_v_heads, s.n_embd, false),
        ssm_norm: m.vector(format!("blk.{layer}.ssm_norm.weight"), s.delta.1),
        ssm_out: m.linear(layer, "ssm_out", s.n_embd, value, false),
        shape,
    })
}

fn feed_forward(m: &mut Maker, s: &Shape, layer: usize) -> Block<Weight> {
    let ffn_norm = m.vector(format!("blk.{layer}.post_attention_norm.weight"), s.n_embd);
    let (n_experts, n_used, n_ff) = s.experts;
    if n_experts == 0 {
        return Block::Ffn(Ffn {
            layer,
            shape: FfnShape { n_embd: s.n_embd, n_ff: s.n_ff, rms_eps: 1e-6 },
            ffn_norm,
            ffn_gate: m.linear(layer, "ffn_gate", s.n_ff, s.n_embd, false),
            ffn_up: m.linear(layer, "ffn_up", s.n_ff, s.n_embd, false),
            ffn_down: m.linear(layer, "ffn_down", s.n_embd, s.n_ff, true),
        });
    }
    let shape = MoeShape { n_embd: s.n_embd, n_experts, n_used, n_ff, n_ff_shared: n_ff, rms_eps: 1e-6 };
    Block::Moe(Moe {
        layer,
        shape,
        experts: 0..n_experts,
        ffn_norm,
        ffn_gate_inp: m.tensor(format!("blk.{layer}.ffn_gate_inp.weight"), TensorType::F32, n_experts, s.n_embd),
        ffn_gate_exps: m.linear(layer, "ffn_gate_exps", n_experts * n_ff, s.n_embd, false),
        ffn_up_exps: m.linear(layer, "ffn_up_exps", n_experts * n_ff, s.n_embd, false),
        ffn_down_exps: m.linear(layer, "ffn_down_exps", n_experts * s.n_embd, n_ff, true),
        shared: Some(SharedExpert {
            ffn_gate_inp_shexp: Some(m.vector(format!("blk.{layer}.ffn_gate_inp_shexp.weight"), s.n_embd)),
            ffn_gate_shexp: m.linear(layer, "ffn_gate_shexp", n_ff, s.n_embd, false),
            ffn_up_shexp: m.linear(layer, "ffn_up_shexp", n_ff, s.n_embd, false),
            ffn_down_shexp: m.linear(layer, "ffn_down_shexp", s.n_embd, n_ff, true),
        }),
    })
}

/// The description that a file of this shape and mix would give.
pub fn model(s: &Shape, mix: Mix) -> Model {
    let mut m = Maker { mix, n_layers: s.n_layers, n_tensors: 0 };
    let of_head = match mix {
        Mix::Q4KM => TensorType::Q6_K,
        Mix::All(ty) => ty,
    };
    let of_table = match mix {
        Mix::Q4KM if !s.tied => TensorType::Q4_K,
        _ => of_head,
    };
    let table = m.tensor("token_embd.weight".into(), fallback(of_table, s.n_embd), s.n_vocab, s.n_embd);
    let output = match s.tied {
        true => table.clone(),
        false => m.tensor("output.weight".into(), fallback(of_head, s.n_embd), s.n_vocab, s.n_embd),
    };
    let mut blocks = vec![Block::Embed(Embed { n_embd: s.n_embd, n_vocab: s.n_vocab, token_embd: table })];
    for layer in 0..s.n_layers {
        let recurrent = s.n_v_heads > 0 && (layer + 1) % s.interval != 0;
        blocks.push(if recurrent { delta_net(&mut m, s, layer) } else { attention(&mut m, s, layer) });
        blocks.push(feed_forward(&mut m, s, layer));
    }
    blocks.push(Block::Head(Head {
        shape: HeadShape { n_embd: s.n_embd, n_vocab: s.n_vocab, rms_eps: 1e-6 },
        output_norm: m.vector("output_norm.weight".into(), s.n_embd),
        output: Linear { weight: output, scale: None, bias: None },
    }));
    let arch = match (s.n_v_heads > 0, s.experts.0 > 0) {
        (true, true) => "qwen35moe",
        (true, false) => "qwen35",
        (false, true) => "qwen3moe",
        (false, false) => "qwen3",
    };
    Model {
        arch: arch.into(),
        name: s.name.into(),
        n_embd: s.n_embd,
        n_vocab: s.n_vocab,
        n_layers: s.n_layers,
        n_ctx_train: 262_144,
        blocks,
        mtp: None,
    }
}

/// The tensors of the file, in the order of their indices.
pub fn tensors(model: &Model) -> Vec<Tensor> {
    let mut all = BTreeMap::new();
    for block in &model.blocks {
        block.for_each(&mut |w| {
            all.insert(w.tensor, Tensor { name: w.name.clone(), ty: w.ty, ne: vec![w.n_cols, w.n_rows()] });
        });
    }
    all.into_values().collect()
}
