//! Writes GGUF files of any kind, right or wrong, in memory: a list of keys and tensors whose every stated number can
//! be overridden, and small sound models of each architecture to start from. Shares no code with the reader.

/// Tensor type ids used here, with elements and bytes of a block.
pub const F32: (u32, u64, u64) = (0, 1, 4);
pub const Q8_0: (u32, u64, u64) = (8, 32, 34);
pub const Q4_K: (u32, u64, u64) = (12, 256, 144);

/// A metadata value: type id and bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Value(pub u32, pub Vec<u8>);

pub fn u8(v: u8) -> Value {
    Value(0, vec![v])
}

pub fn u16(v: u16) -> Value {
    Value(2, v.to_le_bytes().into())
}

pub fn u32(v: u32) -> Value {
    Value(4, v.to_le_bytes().into())
}

pub fn i32(v: i32) -> Value {
    Value(5, v.to_le_bytes().into())
}

pub fn f32(v: f32) -> Value {
    Value(6, v.to_le_bytes().into())
}

pub fn bool(v: bool) -> Value {
    Value(7, vec![v.into()])
}

pub fn text(v: impl AsRef<[u8]>) -> Value {
    Value(8, string(v.as_ref()))
}

/// An array whose header states `len`, of element type `ty`, over `elements`.
pub fn array_of(ty: u32, len: u64, elements: Vec<u8>) -> Value {
    Value(9, [&ty.to_le_bytes()[..], &len.to_le_bytes(), &elements].concat())
}

pub fn i32s(v: &[i32]) -> Value {
    array_of(5, v.len() as u64, v.iter().flat_map(|v| v.to_le_bytes()).collect())
}

pub fn f32s(v: &[f32]) -> Value {
    array_of(6, v.len() as u64, v.iter().flat_map(|v| v.to_le_bytes()).collect())
}

pub fn bools(v: &[bool]) -> Value {
    array_of(7, v.len() as u64, v.iter().map(|v| (*v).into()).collect())
}

pub fn texts<S: AsRef<[u8]>>(v: &[S]) -> Value {
    array_of(8, v.len() as u64, v.iter().flat_map(|v| string(v.as_ref())).collect())
}

fn string(v: &[u8]) -> Vec<u8> {
    [&(v.len() as u64).to_le_bytes()[..], v].concat()
}

/// An entry of the tensor table with its data.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: Vec<u8>,
    pub ne: Vec<u64>,
    pub ty: u32,
    /// Bytes that the shape asks for.
    pub size: u64,
    /// The first bytes of the data; the others are zero.
    pub data: Vec<u8>,
    /// Offset to state instead of the right one.
    pub offset: Option<u64>,
    /// Number of dimensions to state instead of the right one.
    pub n_dims: Option<u32>,
}

/// A file to be written.
#[derive(Clone, Debug)]
pub struct Craft {
    pub version: u32,
    pub alignment: u64,
    pub keys: Vec<(Vec<u8>, Value)>,
    pub tensors: Vec<Tensor>,
    /// Counts to state instead of the right ones.
    pub n_keys: Option<u64>,
    pub n_tensors: Option<u64>,
}

impl Default for Craft {
    fn default() -> Self {
        Self { version: 3, alignment: 32, keys: vec![], tensors: vec![], n_keys: None, n_tensors: None }
    }
}

impl Craft {
    /// Appends a key.
    pub fn key(&mut self, name: impl AsRef<[u8]>, value: Value) -> &mut Self {
        self.keys.push((name.as_ref().into(), value));
        self
    }

    /// Gives a key another value, or appends it.
    pub fn set(&mut self, name: &str, value: Value) -> &mut Self {
        match self.keys.iter_mut().find(|(key, _)| key == name.as_bytes()) {
            Some((_, old)) => *old = value,
            None => self.keys.push((name.into(), value)),
        }
        self
    }

    pub fn remove(&mut self, name: &str) -> &mut Self {
        self.keys.retain(|(key, _)| key != name.as_bytes());
        self
    }

    /// Appends a tensor of shape `ne` with seeded noise of about 1/sqrt(ne[0]) if it is F32, else zeros.
    pub fn tensor(&mut self, name: &str, ne: &[u64], (ty, len, bytes): (u32, u64, u64)) -> &mut Self {
        let n: u64 = ne.iter().product();
        let data = if ty == F32.0 && n < 1 << 16 { noise(name, n, ne[0]) } else { Vec::new() };
        let size = n / len * bytes;
        self.tensors.push(Tensor { name: name.into(), ne: ne.into(), ty, size, data, offset: None, n_dims: None });
        self
    }

    pub fn tensor_mut(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|t| t.name == name.as_bytes()).expect("a tensor of the crafted file")
    }

    pub fn remove_tensor(&mut self, name: &str) -> Tensor {
        let at = self.tensors.iter().position(|t| t.name == name.as_bytes()).expect("a tensor of the crafted file");
        self.tensors.remove(at)
    }

    /// Everything in front of the data.
    pub fn header(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.n_tensors.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.n_keys.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (key, Value(ty, bytes)) in &self.keys {
            out.extend(string(key));
            out.extend(ty.to_le_bytes());
            out.extend(bytes);
        }
        let mut offset = 0u64;
        for t in &self.tensors {
            out.extend(string(&t.name));
            out.extend(t.n_dims.unwrap_or(t.ne.len() as u32).to_le_bytes());
            t.ne.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(t.ty.to_le_bytes());
            out.extend(t.offset.unwrap_or(offset).to_le_bytes());
            offset += t.size.next_multiple_of(self.alignment);
        }
        out
    }

    /// Bytes of the whole file.
    pub fn len(&self) -> u64 {
        let data: u64 = self.tensors.iter().map(|t| t.size.next_multiple_of(self.alignment)).sum();
        (self.header().len() as u64).next_multiple_of(self.alignment) + data
    }

    /// The whole file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        for t in &self.tensors {
            out.resize((out.len() as u64).next_multiple_of(self.alignment) as usize, 0);
            let start = out.len();
            out.extend(&t.data);
            out.resize(start + t.size as usize, 0);
        }
        out.resize((out.len() as u64).next_multiple_of(self.alignment) as usize, 0);
        out
    }
}

/// `n` floats seeded by `name`, of standard deviation about `1 / sqrt(n_in)`; norms are near 1 and `ssm_a` negative.
fn noise(name: &str, n: u64, n_in: u64) -> Vec<u8> {
    let mut state =
        name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n)
        .flat_map(|_| {
            let x = next();
            let x = match name {
                _ if name.contains("norm") => 1.0 + 0.1 * x,
                _ if name.ends_with("ssm_a") => -0.5 + 0.4 * x,
                _ => 1.7 * x / (n_in as f32).sqrt(),
            };
            x.to_le_bytes()
        })
        .collect()
}

/// Sizes of a model, in GGUF terms; 0 for what an architecture does not have.
#[derive(Clone, Debug, Default)]
pub struct Shape {
    pub arch: &'static str,
    pub n_vocab: u64,
    pub n_embd: u64,
    pub n_layers: u64,
    pub n_heads: u64,
    pub n_kv_heads: u64,
    pub head_dim: u64,
    pub n_ff: u64,
    pub n_rot: u64,
    pub sections: [i32; 4],
    /// Every how many layers attention stands in a hybrid.
    pub interval: u64,
    pub ssm_state: u64,
    pub ssm_groups: u64,
    pub ssm_heads: u64,
    pub n_experts: u64,
    pub n_used: u64,
    pub n_ff_exp: u64,
    pub n_ff_shared: u64,
    pub tied: bool,
    pub mtp: bool,
}

/// A model of a few kilobytes of each architecture.
pub fn tiny(arch: &'static str) -> Shape {
    let hybrid = ["qwen35", "qwen35moe", "qwen3next"].contains(&arch);
    let moe = ["qwen35moe", "qwen3next", "qwen3moe"].contains(&arch);
    let dense = Shape {
        arch,
        n_vocab: 8,
        n_embd: 8,
        n_layers: 2,
        n_heads: 2,
        n_kv_heads: 1,
        head_dim: 4,
        n_rot: 4,
        ..Shape::default()
    };
    Shape {
        n_ff: if moe { 0 } else { 8 },
        interval: if hybrid { 2 } else { 0 },
        sections: if hybrid && arch != "qwen3next" { [1, 1, 0, 0] } else { [0; 4] },
        ssm_state: if hybrid { 4 } else { 0 },
        ssm_groups: if hybrid { 2 } else { 0 },
        ssm_heads: if hybrid { 4 } else { 0 },
        n_experts: if moe { 3 } else { 0 },
        n_used: if moe { 2 } else { 0 },
        n_ff_exp: if moe { 8 } else { 0 },
        n_ff_shared: if moe && hybrid { 8 } else { 0 },
        ..dense
    }
}

pub const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
                            {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// The model with matrices of type `ty`; its vocabulary has eight tokens.
pub fn model(s: &Shape, ty: (u32, u64, u64)) -> Craft {
    let mut c = Craft::default();
    let a = s.arch;
    let name = |key: &str| format!("{a}.{key}");
    let n = |v: u64| u32(v as u32);
    let n_all = s.n_layers + u64::from(s.mtp);
    c.key("general.architecture", text(a)).key("general.name", text("crafted"));
    c.key(name("block_count"), n(n_all)).key(name("context_length"), n(64)).key(name("embedding_length"), n(s.n_embd));
    c.key(name("attention.head_count"), n(s.n_heads)).key(name("attention.head_count_kv"), n(s.n_kv_heads));
    c.key(name("attention.key_length"), n(s.head_dim)).key(name("attention.value_length"), n(s.head_dim));
    c.key(name("attention.layer_norm_rms_epsilon"), f32(1e-6)).key(name("rope.freq_base"), f32(10000.0));
    c.key(name("rope.dimension_count"), n(s.n_rot));
    if s.n_ff > 0 {
        c.key(name("feed_forward_length"), n(s.n_ff));
    }
    if s.n_experts > 0 {
        c.key(name("expert_count"), n(s.n_experts)).key(name("expert_used_count"), n(s.n_used));
        c.key(name("expert_feed_forward_length"), n(s.n_ff_exp));
    }
    if s.n_ff_shared > 0 {
        c.key(name("expert_shared_feed_forward_length"), n(s.n_ff_shared));
    }
    if s.interval > 0 {
        c.key(name("full_attention_interval"), n(s.interval)).key(name("ssm.conv_kernel"), n(4));
        c.key(name("ssm.state_size"), n(s.ssm_state)).key(name("ssm.group_count"), n(s.ssm_groups));
        c.key(name("ssm.time_step_rank"), n(s.ssm_heads)).key(name("ssm.inner_size"), n(s.ssm_heads * s.ssm_state));
        if s.sections != [0; 4] {
            c.key(name("rope.dimension_sections"), i32s(&s.sections));
        }
    }
    if s.mtp {
        c.key(name("nextn_predict_layers"), u32(1));
    }
    c.key("tokenizer.ggml.model", text("gpt2")).key("tokenizer.ggml.pre", text("qwen2"));
    c.key("tokenizer.ggml.tokens", texts(&["a", "b", "ab", "c", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "d"]));
    c.key("tokenizer.ggml.token_type", i32s(&[1, 1, 1, 1, 3, 3, 3, 1])).key("tokenizer.ggml.merges", texts(&["a b"]));
    c.key("tokenizer.ggml.eos_token_id", u32(5)).key("tokenizer.ggml.padding_token_id", u32(6));
    c.key("tokenizer.ggml.add_bos_token", bool(false)).key("tokenizer.chat_template", text(TEMPLATE));

    c.tensor("token_embd.weight", &[s.n_embd, s.n_vocab], ty).tensor("output_norm.weight", &[s.n_embd], F32);
    if !s.tied {
        c.tensor("output.weight", &[s.n_embd, s.n_vocab], ty);
    }
    for il in 0..n_all {
        let attention = s.interval == 0 || il >= s.n_layers || (il + 1) % s.interval == 0;
        let p = format!("blk.{il}.");
        let mut tensor = |name: &str, ne: &[u64], ty| {
            c.tensor(&format!("{p}{name}"), ne, ty);
        };
        tensor("attn_norm.weight", &[s.n_embd], F32);
        if attention {
            let (q, kv) = (s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim);
            let gate = if s.interval > 0 { 2 } else { 1 };
            tensor("attn_q.weight", &[s.n_embd, q * gate], ty);
            tensor("attn_k.weight", &[s.n_embd, kv], ty);
            tensor("attn_v.weight", &[s.n_embd, kv], ty);
            tensor("attn_output.weight", &[q, s.n_embd], ty);
            if a == "qwen2" {
                tensor("attn_q.bias", &[q], F32);
                tensor("attn_k.bias", &[kv], F32);
                tensor("attn_v.bias", &[kv], F32);
            }
            if !["llama", "qwen2"].contains(&a) {
                tensor("attn_q_norm.weight", &[s.head_dim], F32);
                tensor("attn_k_norm.weight", &[s.head_dim], F32);
            }
        } else {
            let value = s.ssm_heads * s.ssm_state;
            let channels = 2 * s.ssm_groups * s.ssm_state + value;
            tensor("attn_qkv.weight", &[s.n_embd, channels], ty);
            tensor("attn_gate.weight", &[s.n_embd, value], ty);
            if a == "qwen3next" {
                tensor("ssm_ba.weight", &[s.n_embd, 2 * s.ssm_heads], ty);
            } else {
                tensor("ssm_beta.weight", &[s.n_embd, s.ssm_heads], ty);
                tensor("ssm_alpha.weight", &[s.n_embd, s.ssm_heads], ty);
            }
            tensor("ssm_conv1d.weight", &[4, channels], F32);
            tensor("ssm_dt.bias", &[s.ssm_heads], F32);
            tensor("ssm_a", &[s.ssm_heads], F32);
            tensor("ssm_norm.weight", &[s.ssm_state], F32);
            tensor("ssm_out.weight", &[value, s.n_embd], ty);
        }
        let norm = if s.interval > 0 { "post_attention_norm.weight" } else { "ffn_norm.weight" };
        tensor(norm, &[s.n_embd], F32);
        if s.n_experts == 0 {
            tensor("ffn_gate.weight", &[s.n_embd, s.n_ff], ty);
            tensor("ffn_up.weight", &[s.n_embd, s.n_ff], ty);
            tensor("ffn_down.weight", &[s.n_ff, s.n_embd], ty);
        } else {
            tensor("ffn_gate_inp.weight", &[s.n_embd, s.n_experts], F32);
            tensor("ffn_gate_exps.weight", &[s.n_embd, s.n_ff_exp, s.n_experts], ty);
            tensor("ffn_up_exps.weight", &[s.n_embd, s.n_ff_exp, s.n_experts], ty);
            tensor("ffn_down_exps.weight", &[s.n_ff_exp, s.n_embd, s.n_experts], ty);
            if s.n_ff_shared > 0 {
                tensor("ffn_gate_inp_shexp.weight", &[s.n_embd], F32);
                tensor("ffn_gate_shexp.weight", &[s.n_embd, s.n_ff_shared], ty);
                tensor("ffn_up_shexp.weight", &[s.n_embd, s.n_ff_shared], ty);
                tensor("ffn_down_shexp.weight", &[s.n_ff_shared, s.n_embd], ty);
            }
        }
        if il >= s.n_layers {
            tensor("nextn.eh_proj.weight", &[2 * s.n_embd, s.n_embd], ty);
            tensor("nextn.enorm.weight", &[s.n_embd], F32);
            tensor("nextn.hnorm.weight", &[s.n_embd], F32);
            tensor("nextn.shared_head_norm.weight", &[s.n_embd], F32);
        }
    }
    c
}
