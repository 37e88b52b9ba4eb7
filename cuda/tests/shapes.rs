//! Blocks of the released Qwen3.5 shapes with the type mixes of the usual files, without data: for compilations and
//! benches. Sources and sizes: the table of released shapes in docs, the `_M` rule of quantised files.

use tandem_spec::{
    Attention, AttentionShape, Block, DeltaNet, DeltaNetShape, Embed, Ffn, FfnShape, Head, HeadOrder, HeadShape,
    Linear, Moe, MoeShape, Rope, RopeScaling, RopeStyle, SharedExpert, Tensor, TensorType, Weight,
};

/// A released model.
pub struct Released {
    pub name: &'static str,
    pub n_embd: usize,
    pub n_layers: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub n_ff: usize,
    pub n_v_heads: usize,
    /// Routed experts, used, their width (and the shared expert's).
    pub experts: Option<(usize, usize, usize)>,
    pub tied: bool,
}

const fn dense(
    name: &'static str,
    n_embd: usize,
    n_layers: usize,
    heads: (usize, usize),
    n_ff: usize,
    n_v_heads: usize,
    tied: bool,
) -> Released {
    Released { name, n_embd, n_layers, n_heads: heads.0, n_kv_heads: heads.1, n_ff, n_v_heads, experts: None, tied }
}

pub const RELEASED: &[Released] = &[
    dense("0.8B", 1024, 24, (8, 2), 3584, 16, true),
    dense("4B", 2560, 32, (16, 4), 9216, 32, true),
    dense("9B", 4096, 32, (16, 4), 12288, 32, false),
    dense("27B", 5120, 64, (24, 4), 17408, 48, false),
    Released {
        name: "35B-A3B",
        n_embd: 2048,
        n_layers: 40,
        n_heads: 16,
        n_kv_heads: 2,
        n_ff: 0,
        n_v_heads: 32,
        experts: Some((256, 8, 512)),
        tied: false,
    },
];

const N_VOCAB: usize = 248320;

/// Blocks of a model and the table of its tensors.
pub struct Made {
    pub blocks: Vec<Block<Weight>>,
    #[allow(dead_code)] // read by the bench
    pub tensors: Vec<Tensor>,
}

/// Types of a file: the base type, and the type of the tensors that `_M` mixes give more bits.
struct Maker {
    tensors: Vec<Tensor>,
    base: TensorType,
    more: TensorType,
}

impl Maker {
    fn weight(&mut self, name: String, ty: TensorType, n_rows: usize, n_cols: usize) -> Weight {
        let tensor = Tensor { name, ty, ne: vec![n_cols, n_rows] };
        self.tensors.push(tensor);
        Weight::whole(self.tensors.len() - 1, &self.tensors[self.tensors.len() - 1])
    }

    fn vector(&mut self, name: String, n: usize) -> Weight {
        self.weight(name, TensorType::F32, 1, n)
    }

    fn linear(&mut self, name: String, more: bool, n_rows: usize, n_cols: usize) -> Linear<Weight> {
        let ty = if more { self.more } else { self.base };
        Linear { weight: self.weight(name, ty, n_rows, n_cols), scale: None, bias: None }
    }
}

/// The blocks of `model` in a file of type `base`, where some tensors are `more` (the same in plain files).
pub fn make(model: &Released, base: TensorType, more: TensorType) -> Made {
    let mut m = Maker { tensors: Vec::new(), base, more };
    let (e, n_layers) = (model.n_embd, model.n_layers);
    let embed_ty = if model.tied { more } else { base };
    let token_embd = m.weight("token_embd.weight".into(), embed_ty, N_VOCAB, e);
    let mut blocks = vec![Block::Embed(Embed { n_embd: e, n_vocab: N_VOCAB, token_embd: token_embd.clone() })];
    for layer in 0..n_layers {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let more_bits = layer < n_layers / 8 || layer >= 7 * n_layers / 8 || (layer - n_layers / 8) % 3 == 2;
        if (layer + 1) % 4 == 0 {
            let d = 256;
            let (q, kv) = (model.n_heads * d, model.n_kv_heads * d);
            let rope = Rope {
                n_rot: 64,
                base: 1e7,
                style: RopeStyle::Neox,
                scaling: RopeScaling::None,
                rotated_pairs: Vec::new(),
            };
            let shape = AttentionShape {
                n_embd: e,
                n_heads: model.n_heads,
                n_kv_heads: model.n_kv_heads,
                head_dim: d,
                gated: true,
                rms_eps: 1e-6,
                rope,
            };
            blocks.push(Block::Attention(Attention {
                layer,
                shape,
                attn_norm: m.vector(name("attn_norm"), e),
                attn_q: m.linear(name("attn_q"), false, 2 * q, e),
                attn_k: m.linear(name("attn_k"), false, kv, e),
                attn_v: m.linear(name("attn_v"), more_bits, kv, e),
                attn_q_norm: Some(m.vector(name("attn_q_norm"), d)),
                attn_k_norm: Some(m.vector(name("attn_k_norm"), d)),
                rope_freqs: None,
                attn_output: m.linear(name("attn_output"), false, e, q),
            }));
        } else {
            let shape = DeltaNetShape {
                n_embd: e,
                n_k_heads: 16,
                n_v_heads: model.n_v_heads,
                head_dim: 128,
                conv_kernel: 4,
                head_order: HeadOrder::Tiled,
                rms_eps: 1e-6,
            };
            blocks.push(Block::DeltaNet(DeltaNet {
                layer,
                attn_norm: m.vector(name("attn_norm"), e),
                attn_qkv: m.linear(name("attn_qkv"), more_bits, shape.n_channels(), e),
                attn_gate: m.linear(name("attn_gate"), false, shape.n_value(), e),
                ssm_conv1d: m.weight(name("ssm_conv1d"), TensorType::F32, shape.n_channels(), 4),
                ssm_dt: m.vector(format!("blk.{layer}.ssm_dt.bias"), shape.n_v_heads),
                ssm_a: m.vector(format!("blk.{layer}.ssm_a"), shape.n_v_heads),
                ssm_beta: m.linear(name("ssm_beta"), false, shape.n_v_heads, e),
                ssm_alpha: m.linear(name("ssm_alpha"), false, shape.n_v_heads, e),
                ssm_norm: m.vector(name("ssm_norm"), 128),
                ssm_out: m.linear(name("ssm_out"), false, e, shape.n_value()),
                shape,
            }));
        }
        let ffn_norm = m.vector(name("post_attention_norm"), e);
        blocks.push(match model.experts {
            None => Block::Ffn(Ffn {
                layer,
                shape: FfnShape { n_embd: e, n_ff: model.n_ff, rms_eps: 1e-6 },
                ffn_norm,
                ffn_gate: m.linear(name("ffn_gate"), false, model.n_ff, e),
                ffn_up: m.linear(name("ffn_up"), false, model.n_ff, e),
                ffn_down: m.linear(name("ffn_down"), more_bits, e, model.n_ff),
            }),
            Some((n_experts, n_used, n_ff)) => Block::Moe(Moe {
                layer,
                shape: MoeShape { n_embd: e, n_experts, n_used, n_ff, n_ff_shared: n_ff, rms_eps: 1e-6 },
                experts: 0..n_experts,
                ffn_norm,
                ffn_gate_inp: m.weight(name("ffn_gate_inp"), TensorType::F32, n_experts, e),
                ffn_gate_exps: m.linear(name("ffn_gate_exps"), false, n_experts * n_ff, e),
                ffn_up_exps: m.linear(name("ffn_up_exps"), false, n_experts * n_ff, e),
                ffn_down_exps: m.linear(name("ffn_down_exps"), more_bits, n_experts * e, n_ff),
                shared: Some(SharedExpert {
                    ffn_gate_inp_shexp: Some(m.vector(name("ffn_gate_inp_shexp"), e)),
                    ffn_gate_shexp: m.linear(name("ffn_gate_shexp"), false, n_ff, e),
                    ffn_up_shexp: m.linear(name("ffn_up_shexp"), false, n_ff, e),
                    ffn_down_shexp: m.linear(name("ffn_down_shexp"), more_bits, e, n_ff),
                }),
            }),
        });
    }
    let output_norm = m.vector("output_norm.weight".into(), e);
    let output = if model.tied {
        Linear { weight: token_embd, scale: None, bias: None }
    } else {
        m.linear("output.weight".into(), true, N_VOCAB, e)
    };
    blocks.push(Block::Head(Head {
        shape: HeadShape { n_embd: e, n_vocab: N_VOCAB, rms_eps: 1e-6 },
        output_norm,
        output,
    }));
    Made { blocks, tensors: m.tensors }
}
