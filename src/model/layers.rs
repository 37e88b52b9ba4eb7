//! The parts that architectures share: common hyperparameters, rotary embedding, attention, delta net, feed-forward
//! and experts, and the order of a model's blocks. Tensors that a file stores fused come apart here.

use super::reader::{Reader, part};
use tandem_spec::*;

/// Blocks that a file may have, MTP included.
const BLOCKS_MAX: usize = 512;
const EXPERTS_MAX: usize = 1024;
/// Bounds far above every known model that keep products of sizes small enough to be computed without a check.
const WIDTH_MAX: usize = 1 << 20;
const HEADS_MAX: usize = 1 << 14;
const HEAD_DIM_MAX: usize = 1 << 10;
const CONTEXT_MAX: usize = 1 << 28;
const VOCABULARY_MAX: usize = 1 << 24;

/// Hyperparameters that every architecture has.
pub(super) struct Common {
    pub(super) n_embd: usize,
    /// Trunk layers.
    pub(super) n_layers: usize,
    /// Multi-token-prediction blocks after the trunk.
    n_mtp: usize,
    n_ctx_train: usize,
    /// Width of the dense feed-forward blocks; 0 if the file does not say.
    pub(super) n_ff: usize,
    pub(super) rms_eps: f32,
    /// Heads of each block `[n_layers + n_mtp]`; entries of recurrent layers may be 0.
    n_heads: Vec<usize>,
    n_kv_heads: Vec<usize>,
    head_dim: usize,
}

impl Common {
    pub(super) fn read(r: &mut Reader) -> Self {
        let n_all = r.number("block_count", None, 1..=BLOCKS_MAX);
        let n_mtp = r.number("nextn_predict_layers", Some(0), 0..=n_all - 1);
        let n_embd = r.number("embedding_length", None, 1..=WIDTH_MAX);
        let n_heads = r.per_layer("attention.head_count", None, n_all, 0..=HEADS_MAX);
        let n_kv_heads = r.per_layer("attention.head_count_kv", Some(&n_heads), n_all, 0..=HEADS_MAX);
        let most = *n_heads.iter().max().expect("there is a block");
        if most == 0 {
            r.wrong("attention.head_count", "at least one head", 0);
        }
        let head_dim = r.number("attention.key_length", Some(n_embd / most.max(1)), 1..=HEAD_DIM_MAX);
        if most * head_dim > WIDTH_MAX {
            let expected = format!("heads of {head_dim} that are at most {WIDTH_MAX} wide together");
            r.wrong("attention.head_count", expected, most);
        }
        let value_length = r.number("attention.value_length", Some(head_dim), 1..=HEAD_DIM_MAX);
        if value_length != head_dim {
            r.wrong("attention.value_length", format!("{head_dim}, the width of the keys"), value_length);
        }
        Self {
            n_embd,
            n_layers: n_all - n_mtp,
            n_mtp,
            n_ctx_train: r.number("context_length", None, 1..=CONTEXT_MAX),
            n_ff: r.number("feed_forward_length", Some(0), 0..=WIDTH_MAX),
            rms_eps: r.real("attention.layer_norm_rms_epsilon", None, 1e-30..=1.0) as f32,
            n_heads,
            n_kv_heads,
            head_dim,
        }
    }

    /// Width of the dense feed-forward blocks, which the architecture needs.
    pub(super) fn dense_ff(&self, r: &mut Reader) -> usize {
        r.number("feed_forward_length", None, 1..=WIDTH_MAX)
    }

    /// The whole model: the embedding, what `layer` makes of each trunk layer, the head, and one MTP block.
    /// Hyperparameters must have been read and found sound.
    pub(super) fn model(
        &self,
        r: &mut Reader,
        layer: impl Fn(&mut Reader, usize) -> [Block<Weight>; 2],
    ) -> Option<Model> {
        let n_embd = self.n_embd;
        let n_vocab = r.rows("token_embd.weight", VOCABULARY_MAX);
        let token_embd = r.matrix("token_embd.weight", n_embd, n_vocab);
        r.check_tokens(n_vocab);
        let mut blocks = vec![Block::Embed(Embed { n_embd, n_vocab, token_embd: token_embd.clone() })];
        for il in 0..self.n_layers {
            blocks.extend(layer(r, il));
        }
        let shape = HeadShape { n_embd, n_vocab, rms_eps: self.rms_eps };
        let output_norm = r.vector("output_norm.weight", n_embd);
        let output = match r.find("output.weight") {
            Some(_) => r.linear("output", n_embd, n_vocab),
            None => Linear { weight: token_embd, scale: None, bias: None },
        };
        blocks.push(Block::Head(Head { shape, output_norm, output }));
        let mtp = self.mtp(r, n_vocab, layer);
        r.refuse_layers_from(self.n_layers + self.n_mtp);
        r.sound().then(|| Model {
            arch: r.arch.to_string(),
            name: r.file.metadata().get::<&str>("general.name").ok().flatten().unwrap_or_default().to_string(),
            n_embd,
            n_vocab,
            n_layers: self.n_layers,
            n_ctx_train: self.n_ctx_train,
            blocks,
            mtp,
        })
    }

    /// The first MTP block, unless the file has left out all of its tensors. Later ones are not described: what
    /// several are for is not known.
    fn mtp(
        &self,
        r: &mut Reader,
        n_vocab: usize,
        layer: impl Fn(&mut Reader, usize) -> [Block<Weight>; 2],
    ) -> Option<Mtp<Weight>> {
        let (il, n_embd) = (self.n_layers, self.n_embd);
        let p = format!("blk.{il}.");
        if self.n_mtp == 0 || !r.file.tensors().iter().any(|t| t.name.starts_with(&p)) {
            return None;
        }
        let n = |name: &str| format!("{p}nextn.{name}");
        Some(Mtp {
            layer: il,
            enorm: r.vector(&n("enorm.weight"), n_embd),
            hnorm: r.vector(&n("hnorm.weight"), n_embd),
            eh_proj: r.linear(&n("eh_proj"), 2 * n_embd, n_embd),
            blocks: layer(r, il).into(),
            shared_head_norm: r.optional_vector(&n("shared_head_norm.weight"), n_embd),
            embed_tokens: r
                .find(&n("embed_tokens.weight"))
                .map(|_| r.matrix(&n("embed_tokens.weight"), n_embd, n_vocab)),
            shared_head_head: r
                .find(&n("shared_head_head.weight"))
                .map(|_| r.linear(&n("shared_head_head"), n_embd, n_vocab)),
        })
    }
}

/// What an attention layer of an architecture looks like.
pub(super) struct AttentionLayers {
    /// A sigmoid gate beside each query head.
    pub(super) gated: bool,
    /// Whether `attn_q_norm` and `attn_k_norm` must exist.
    pub(super) qk_norm: bool,
    /// Whether `attn_q`, `attn_k` and `attn_v` must have biases.
    pub(super) qkv_bias: bool,
    pub(super) rope: Rope,
    /// `rope_freqs` of the whole model.
    pub(super) rope_freqs: Option<Weight>,
}

impl AttentionLayers {
    /// Rotary embedding with pairs of `style`; checks the head counts of the layers that `is_attention` names.
    pub(super) fn rope(
        r: &mut Reader,
        common: &Common,
        style: RopeStyle,
        is_attention: impl Fn(usize) -> bool,
    ) -> Rope {
        for il in (0..common.n_layers + common.n_mtp).filter(|il| is_attention(*il)) {
            let (n_heads, n_kv_heads) = common.heads(il);
            if n_heads == 0 || n_kv_heads == 0 || !n_heads.is_multiple_of(n_kv_heads) {
                let expected = format!("a divisor of the {n_heads} query heads of block {il}");
                r.wrong("attention.head_count_kv", expected, n_kv_heads);
                break;
            }
        }
        let n_rot = r.number("rope.dimension_count", Some(common.head_dim), 2..=HEAD_DIM_MAX);
        if n_rot > common.head_dim || !n_rot.is_multiple_of(2) {
            r.wrong("rope.dimension_count", format!("an even number up to the head width {}", common.head_dim), n_rot);
        }
        Rope {
            n_rot,
            base: r.real("rope.freq_base", Some(10000.0), 1.0 + f64::EPSILON..=1e30),
            style,
            scaling: rope_scaling(r, common.n_ctx_train),
            rotated_pairs: Vec::new(),
        }
    }

    /// The attention block of layer `il`.
    pub(super) fn block(&self, r: &mut Reader, common: &Common, il: usize) -> Block<Weight> {
        let (p, n_embd, head_dim) = (format!("blk.{il}."), common.n_embd, common.head_dim);
        let (n_heads, n_kv_heads) = common.heads(il);
        let n_q = n_heads * head_dim * if self.gated { 2 } else { 1 };
        let n_kv = n_kv_heads * head_dim;
        let fused = format!("{p}attn_qkv");
        let (attn_q, attn_k, attn_v) = if r.find(&format!("{fused}.weight")).is_some() {
            let all = r.linear(&fused, n_embd, n_q + 2 * n_kv);
            let rows = |start: usize, n: usize| part(&all, std::iter::once(start..start + n));
            (rows(0, n_q), rows(n_q, n_kv), rows(n_q + n_kv, n_kv))
        } else {
            let mut linear = |name: &str, n_out: usize| r.linear(&format!("{p}{name}"), n_embd, n_out);
            (linear("attn_q", n_q), linear("attn_k", n_kv), linear("attn_v", n_kv))
        };
        if self.qkv_bias {
            for (name, linear, n) in [("attn_q", &attn_q, n_q), ("attn_k", &attn_k, n_kv), ("attn_v", &attn_v, n_kv)] {
                if linear.bias.is_none() {
                    r.vector(&format!("{p}{name}.bias"), n);
                }
            }
        }
        let mut norm = |name: &str| match self.qk_norm {
            true => Some(r.vector(&format!("{p}{name}.weight"), head_dim)),
            false => r.optional_vector(&format!("{p}{name}.weight"), head_dim),
        };
        let (attn_q_norm, attn_k_norm) = (norm("attn_q_norm"), norm("attn_k_norm"));
        Block::Attention(Attention {
            layer: il,
            shape: AttentionShape {
                n_embd,
                n_heads,
                n_kv_heads,
                head_dim,
                gated: self.gated,
                rms_eps: common.rms_eps,
                rope: self.rope.clone(),
            },
            attn_norm: r.vector(&format!("{p}attn_norm.weight"), n_embd),
            attn_q,
            attn_k,
            attn_v,
            attn_q_norm,
            attn_k_norm,
            rope_freqs: self.rope_freqs.clone(),
            attn_output: r.linear(&format!("{p}attn_output"), n_heads * head_dim, n_embd),
        })
    }
}

impl Common {
    /// Query and KV heads of block `il`. Some writers give MTP blocks 0 heads, as they do recurrent layers.
    fn heads(&self, il: usize) -> (usize, usize) {
        let of = |counts: &[usize]| match counts[il] {
            0 if il >= self.n_layers => *counts.iter().max().expect("there is a block"),
            n => n,
        };
        (of(&self.n_heads), of(&self.n_kv_heads))
    }
}

/// `rope.scaling.*`.
fn rope_scaling(r: &mut Reader, n_ctx_train: usize) -> RopeScaling {
    let kind = r.get::<&str>("rope.scaling.type").unwrap_or("linear");
    let old = r.real("rope.scale_linear", Some(0.0), 0.0..=1e6);
    let factor = match r.real("rope.scaling.factor", Some(old), 0.0..=1e6) {
        0.0 => 1.0,
        factor => factor,
    };
    let original = r.number("rope.scaling.original_context_length", Some(n_ctx_train), 1..=CONTEXT_MAX);
    match kind {
        "none" => RopeScaling::None,
        "linear" | "yarn" if factor == 1.0 => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor },
        "yarn" => {
            // Keys that change the ramp or the magnitude, and the only values that are computed.
            let fixed = [("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0), ("attn_factor", 1.0)];
            let ramp = [("yarn_beta_fast", 32.0), ("yarn_beta_slow", 1.0), ("yarn_log_multiplier", 0.0)];
            for (name, only) in fixed.into_iter().chain(ramp) {
                let name = format!("rope.scaling.{name}");
                let value = r.real(&name, Some(only), f64::MIN..=f64::MAX);
                if value != only {
                    r.wrong(&name, format!("{only}, the only value that is supported"), value);
                }
            }
            RopeScaling::Yarn { factor, original }
        }
        other => {
            r.wrong("rope.scaling.type", "one of none, linear, yarn", crate::gguf::quoted(other.as_bytes()));
            RopeScaling::None
        }
    }
}

/// Which of the `n_rot / 2` pairs turn in text under `rope.dimension_sections`: interleaved axes of which text moves
/// the first three together and never the fourth. Empty if all do.
pub(super) fn rotated_pairs(r: &mut Reader, n_rot: usize) -> Vec<bool> {
    const KEY: &str = "rope.dimension_sections";
    let half = n_rot / 2;
    let Some(sections) = r.get::<Vec<i32>>(KEY) else {
        r.wrong(KEY, "an array of four i32", "no such array");
        return Vec::new();
    };
    let sizes: Option<Vec<usize>> = sections.iter().map(|s| usize::try_from(*s).ok()).collect();
    let Some([t, h, w, e]) = sizes.as_deref().and_then(|s| <[usize; 4]>::try_from(s).ok()) else {
        r.wrong(KEY, "four integers of at least 0", format!("{:?}", &sections[..sections.len().min(8)]));
        return Vec::new();
    };
    if [t, h, w, e].iter().try_fold(0usize, |n, s| n.checked_add(*s)) != Some(half) {
        r.wrong(KEY, format!("four integers that add up to {half}, half the rotated width"), format!("{sections:?}"));
        return Vec::new();
    }
    let turns: Vec<bool> = (0..half).map(|j| j < 3 * [t, h, w][j % 3]).collect();
    if turns.iter().all(|t| *t) { Vec::new() } else { turns }
}

/// The dense feed-forward block of layer `il`, whose norm is called `norm`.
pub(super) fn ffn(r: &mut Reader, common: &Common, il: usize, norm: &str, n_ff: usize) -> Block<Weight> {
    let (p, n_embd) = (format!("blk.{il}."), common.n_embd);
    Block::Ffn(Ffn {
        layer: il,
        shape: FfnShape { n_embd, n_ff, rms_eps: common.rms_eps },
        ffn_norm: r.vector(&format!("{p}{norm}.weight"), n_embd),
        ffn_gate: r.linear(&format!("{p}ffn_gate"), n_embd, n_ff),
        ffn_up: r.linear(&format!("{p}ffn_up"), n_embd, n_ff),
        ffn_down: r.linear(&format!("{p}ffn_down"), n_ff, n_embd),
    })
}

/// Reads the shape of the mixture-of-experts blocks.
pub(super) fn moe_shape(r: &mut Reader, common: &Common, shared: bool) -> MoeShape {
    let n_experts = r.number("expert_count", None, 1..=EXPERTS_MAX);
    let n_used = r.number("expert_used_count", None, 1..=n_experts);
    let default = Some(common.n_ff / n_used).filter(|n| *n > 0);
    let n_ff = r.number("expert_feed_forward_length", default, 1..=WIDTH_MAX);
    let n_ff_shared = match shared {
        true => r.number("expert_shared_feed_forward_length", Some(common.n_ff).filter(|n| *n > 0), 1..=WIDTH_MAX),
        false => 0,
    };
    MoeShape { n_embd: common.n_embd, n_experts, n_used, n_ff, n_ff_shared, rms_eps: common.rms_eps }
}

/// The mixture-of-experts block of layer `il`, whose norm is called `norm`.
pub(super) fn moe(r: &mut Reader, shape: &MoeShape, il: usize, norm: &str) -> Block<Weight> {
    let &MoeShape { n_embd, n_experts, n_ff, n_ff_shared, .. } = shape;
    let p = format!("blk.{il}.");
    let n = |name: &str| format!("{p}{name}");
    let (ffn_gate_exps, ffn_up_exps) = if r.find(&n("ffn_gate_up_exps.weight")).is_some() {
        let both = r.stack(&n("ffn_gate_up_exps"), &n("ffn_up_exps"), n_embd, 2 * n_ff, n_experts);
        let rows = |first: usize| (0..n_experts).map(move |e| (2 * e + first) * n_ff..(2 * e + first + 1) * n_ff);
        (part(&both, rows(0)), part(&both, rows(1)))
    } else {
        let mut stack = |name: &str| r.stack(&n(name), &n(name), n_embd, n_ff, n_experts);
        (stack("ffn_gate_exps"), stack("ffn_up_exps"))
    };
    let shared = (n_ff_shared > 0).then(|| SharedExpert {
        ffn_gate_inp_shexp: r.optional_vector(&n("ffn_gate_inp_shexp.weight"), n_embd),
        ffn_gate_shexp: r.linear(&n("ffn_gate_shexp"), n_embd, n_ff_shared),
        ffn_up_shexp: r.linear(&n("ffn_up_shexp"), n_embd, n_ff_shared),
        ffn_down_shexp: r.linear(&n("ffn_down_shexp"), n_ff_shared, n_embd),
    });
    Block::Moe(Moe {
        layer: il,
        shape: shape.clone(),
        experts: 0..n_experts,
        ffn_norm: r.vector(&n(&format!("{norm}.weight")), n_embd),
        ffn_gate_inp: r.plain_matrix(&n("ffn_gate_inp.weight"), n_embd, n_experts),
        ffn_gate_exps,
        ffn_up_exps,
        ffn_down_exps: r.stack(&n("ffn_down_exps"), &n("ffn_down_exps"), n_ff, n_embd, n_experts),
        shared,
    })
}

/// Which of all blocks are recurrent: `attention.recurrent_layers`, or all but every
/// `full_attention_interval`-th. MTP blocks never are.
pub(super) fn recurrent_layers(r: &mut Reader, common: &Common) -> Vec<bool> {
    const KEY: &str = "attention.recurrent_layers";
    let n_all = common.n_layers + common.n_mtp;
    let interval = r.number("full_attention_interval", Some(4), 1..=BLOCKS_MAX);
    let mut recurrent: Vec<bool> = (0..n_all).map(|il| !(il + 1).is_multiple_of(interval)).collect();
    if let Some(flags) = r.get::<Vec<bool>>(KEY) {
        if flags.len() == n_all {
            recurrent = flags;
        } else {
            r.wrong(KEY, format!("an array of {n_all}, one entry a block"), format!("{} entries", flags.len()));
        }
    }
    recurrent[common.n_layers..].fill(false);
    recurrent
}

/// Reads the shape of the delta-net blocks.
pub(super) fn delta_net_shape(r: &mut Reader, common: &Common, head_order: HeadOrder) -> DeltaNetShape {
    let head_dim = r.number("ssm.state_size", None, 1..=HEAD_DIM_MAX);
    let n_k_heads = r.number("ssm.group_count", None, 1..=HEADS_MAX);
    let n_v_heads = r.number("ssm.time_step_rank", None, 1..=HEADS_MAX);
    if !n_v_heads.is_multiple_of(n_k_heads) {
        r.wrong("ssm.time_step_rank", format!("a multiple of the {n_k_heads} groups"), n_v_heads);
    }
    let inner = r.number("ssm.inner_size", None, 1..=HEADS_MAX * HEAD_DIM_MAX);
    if inner != n_v_heads * head_dim {
        r.wrong("ssm.inner_size", format!("{n_v_heads} heads of {head_dim}"), inner);
    }
    // Written by one producer; with the other value its V heads lie in another order.
    let tiled = head_order == HeadOrder::Tiled;
    if let Some(reordered) = r.get::<bool>("ssm.v_head_reordered")
        && reordered != tiled
    {
        r.wrong("ssm.v_head_reordered", format!("{tiled} for this architecture"), reordered);
    }
    DeltaNetShape {
        n_embd: common.n_embd,
        n_k_heads,
        n_v_heads,
        head_dim,
        conv_kernel: r.number("ssm.conv_kernel", None, 1..=64),
        head_order,
        rms_eps: common.rms_eps,
    }
}

/// The delta-net block of layer `il`.
pub(super) fn delta_net(r: &mut Reader, shape: &DeltaNetShape, il: usize) -> Block<Weight> {
    let &DeltaNetShape { n_embd, n_k_heads, n_v_heads, head_dim, .. } = shape;
    let (n_channels, n_value, ratio) = (shape.n_channels(), shape.n_value(), n_v_heads / n_k_heads);
    let p = format!("blk.{il}.");
    let n = |name: &str| format!("{p}{name}");
    let (attn_qkv, attn_gate) = if r.find(&n("ssm_in.weight")).is_some() {
        // Per K head: its query, its key, its values, their z.
        let all = r.linear(&n("ssm_in"), n_embd, n_channels + n_value);
        let group = (2 + 2 * ratio) * head_dim;
        let rows = |first: usize, heads: usize| {
            let start = move |g: usize| g * group + first * head_dim;
            (0..n_k_heads).map(move |g| start(g)..start(g) + heads * head_dim)
        };
        let qkv = rows(0, 1).chain(rows(1, 1)).chain(rows(2, ratio));
        (part(&all, qkv), part(&all, rows(2 + ratio, ratio)))
    } else {
        (r.linear(&n("attn_qkv"), n_embd, n_channels), r.linear(&n("attn_gate"), n_embd, n_value))
    };
    let (ssm_beta, ssm_alpha) = if r.find(&n("ssm_ba.weight")).is_some() {
        // Per K head: the betas of its V heads, then their alphas.
        let both = r.linear(&n("ssm_ba"), n_embd, 2 * n_v_heads);
        let rows = |second: usize| (0..n_k_heads).map(move |g| (2 * g + second) * ratio..(2 * g + second + 1) * ratio);
        (part(&both, rows(0)), part(&both, rows(1)))
    } else {
        (r.linear(&n("ssm_beta"), n_embd, n_v_heads), r.linear(&n("ssm_alpha"), n_embd, n_v_heads))
    };
    Block::DeltaNet(DeltaNet {
        layer: il,
        shape: shape.clone(),
        attn_norm: r.vector(&n("attn_norm.weight"), n_embd),
        attn_qkv,
        attn_gate,
        ssm_conv1d: r.plain_matrix(&n("ssm_conv1d.weight"), shape.conv_kernel, n_channels),
        ssm_dt: r.vector(&n("ssm_dt.bias"), n_v_heads),
        ssm_a: r.vector(&n("ssm_a"), n_v_heads),
        ssm_beta,
        ssm_alpha,
        ssm_norm: r.vector(&n("ssm_norm.weight"), head_dim),
        ssm_out: r.linear(&n("ssm_out"), n_value, n_embd),
    })
}

/// A hybrid model: gated attention in every layer that is not recurrent, the delta net in the others.
pub(super) fn hybrid(r: &mut Reader, head_order: HeadOrder, sections: bool, experts: bool) -> Option<Model> {
    let common = Common::read(r);
    let recurrent = recurrent_layers(r, &common);
    let delta = delta_net_shape(r, &common, head_order);
    let mut rope = AttentionLayers::rope(r, &common, RopeStyle::Neox, |il| !recurrent[il]);
    if sections {
        rope.rotated_pairs = rotated_pairs(r, rope.n_rot);
    }
    let attention = AttentionLayers { gated: true, qk_norm: true, qkv_bias: false, rope, rope_freqs: None };
    let moe_shape = experts.then(|| moe_shape(r, &common, true));
    let n_ff = if experts { 0 } else { common.dense_ff(r) };
    if !r.sound() {
        return None;
    }
    const NORM: &str = "post_attention_norm";
    common.model(r, |r, il| {
        let mixer = if recurrent[il] { delta_net(r, &delta, il) } else { attention.block(r, &common, il) };
        let feed_forward = match &moe_shape {
            Some(shape) => moe(r, shape, il, NORM),
            None => ffn(r, &common, il, NORM, n_ff),
        };
        [mixer, feed_forward]
    })
}

/// A model of plain attention in every layer; what differs comes in `attention` (whose rotary embedding is read here)
/// and `experts`.
pub(super) fn dense(r: &mut Reader, style: RopeStyle, qk_norm: bool, qkv_bias: bool, experts: bool) -> Option<Model> {
    let common = Common::read(r);
    let rope = AttentionLayers::rope(r, &common, style, |_| true);
    let moe_shape = experts.then(|| moe_shape(r, &common, false));
    let n_ff = if experts { 0 } else { common.dense_ff(r) };
    if !experts && r.number("expert_count", Some(0), 0..=EXPERTS_MAX) > 0 {
        r.wrong("expert_count", "0 for this architecture", "experts");
    }
    if !r.sound() {
        return None;
    }
    let rope_freqs = match style {
        RopeStyle::Adjacent => r.optional_vector("rope_freqs.weight", rope.n_rot / 2),
        RopeStyle::Neox => None,
    };
    let attention = AttentionLayers { gated: false, qk_norm, qkv_bias, rope, rope_freqs };
    const NORM: &str = "ffn_norm";
    common.model(r, |r, il| {
        let feed_forward = match &moe_shape {
            Some(shape) => moe(r, shape, il, NORM),
            None => ffn(r, &common, il, NORM, n_ff),
        };
        [attention.block(r, &common, il), feed_forward]
    })
}
