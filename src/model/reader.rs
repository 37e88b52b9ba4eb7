//! Checked access to a file's hyperparameters and tensors. A reader goes on after a problem with a stand-in value, so
//! that one pass reports all of them; a model is only made if there were none.

use crate::gguf::{Error, File, FromValue, Problems};
use std::ops::{Range, RangeInclusive};
use tandem_spec::tensor_type::TYPES;
use tandem_spec::{Linear, Tensor, TensorType, Weight};

/// Reads one file as one architecture.
pub(super) struct Reader<'a> {
    pub(super) file: &'a File,
    /// `general.architecture`: the prefix of the keys.
    pub(super) arch: &'a str,
    problems: &'a mut Problems,
    /// Problems before this reader began.
    before: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(file: &'a File, arch: &'a str, problems: &'a mut Problems) -> Self {
        let before = problems.0.len();
        Self { file, arch, problems, before }
    }

    /// Whether there has been no problem so far.
    pub(super) fn sound(&self) -> bool {
        self.problems.0.len() == self.before
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    /// Reports that the value of `{arch}.{name}` is wrong.
    pub(super) fn wrong(&mut self, name: &str, expected: impl Into<String>, found: impl ToString) {
        let error = self.file.metadata().error(&self.key(name), expected, found.to_string());
        self.problems.push(error);
    }

    /// The value of `{arch}.{name}`, or `None` if it is absent or (reported) of another type.
    pub(super) fn get<T: FromValue<'a>>(&mut self, name: &str) -> Option<T> {
        let value = self.file.metadata().get(&self.key(name));
        self.problems.keep(value).flatten()
    }

    /// The integer `{arch}.{name}` within `range`; absent: `default`, or a problem if there is none.
    pub(super) fn number(&mut self, name: &str, default: Option<usize>, range: RangeInclusive<usize>) -> usize {
        let result = match self.file.metadata().get::<usize>(&self.key(name)) {
            Ok(None) if default.is_none() => self.file.metadata().require::<usize>(&self.key(name)).map(Some),
            other => other,
        };
        let Some(value) = self.problems.keep(result) else { return *range.start() };
        let value = value.or(default).expect("an absent key without a default was reported");
        if !range.contains(&value) {
            self.wrong(name, format!("an integer from {} to {}", range.start(), range.end()), value);
            return *range.start();
        }
        value
    }

    /// The number `{arch}.{name}` between `range`'s ends; absent: `default`, or a problem if there is none.
    pub(super) fn real(&mut self, name: &str, default: Option<f64>, range: RangeInclusive<f64>) -> f64 {
        let result = match self.file.metadata().get::<f64>(&self.key(name)) {
            Ok(None) if default.is_none() => self.file.metadata().require::<f64>(&self.key(name)).map(Some),
            other => other,
        };
        let Some(value) = self.problems.keep(result) else { return *range.start() };
        let value = value.or(default).expect("an absent key without a default was reported");
        // NaN is in no range.
        if !range.contains(&value) {
            self.wrong(name, format!("a number from {:e} to {:e}", range.start(), range.end()), value);
            return *range.start();
        }
        value
    }

    /// An integer for each of `n_layers` layers: one value for all, or an array of exactly one each.
    pub(super) fn per_layer(
        &mut self,
        name: &str,
        default: Option<&[usize]>,
        n_layers: usize,
        range: RangeInclusive<usize>,
    ) -> Vec<usize> {
        let is_array = matches!(self.file.metadata().value_of(&self.key(name)), Some(crate::gguf::Value::Array(_)));
        match default {
            Some(default) if self.file.metadata().value_of(&self.key(name)).is_none() => return default.to_vec(),
            _ if !is_array => return vec![self.number(name, None, range); n_layers],
            _ => {}
        }
        let stand_in = vec![*range.start(); n_layers];
        let Some(values) = self.get::<Vec<i32>>(name) else { return stand_in };
        if values.len() != n_layers {
            self.wrong(name, format!("an array of {n_layers}, one entry a block"), format!("{} entries", values.len()));
            return stand_in;
        }
        let values: Vec<_> = values.iter().map(|v| usize::try_from(*v).ok().filter(|v| range.contains(v))).collect();
        match values.iter().position(Option::is_none) {
            None => values.into_iter().flatten().collect(),
            Some(at) => {
                let expected = format!("integers from {} to {}", range.start(), range.end());
                self.wrong(name, expected, format!("another value in entry {at}"));
                stand_in
            }
        }
    }

    /// The tensor `name`, if the file has it.
    pub(super) fn find(&self, name: &str) -> Option<(usize, &'a Tensor)> {
        self.file.tensor_index(name).map(|index| (index, &self.file.tensors()[index]))
    }

    fn tensor_error(&mut self, name: &str, expected: String, found: String) {
        self.problems.push(Error::tensor(self.file.name(), name, expected, found));
    }

    /// Number of rows of the tensor `name`, at most `most`; 1 without such a tensor.
    pub(super) fn rows(&mut self, name: &str, most: usize) -> usize {
        let n_rows = self.find(name).map_or(1, |(_, tensor)| tensor.n_rows());
        if n_rows > most {
            self.tensor_error(name, format!("at most {most} rows"), n_rows.to_string());
        }
        n_rows
    }

    /// All rows of the tensor `name`, which must have shape `ne` (trailing ones may be missing or added) and, if
    /// `plain`, type F32, else a type that the backends multiply with.
    fn tensor(&mut self, name: &str, ne: &[usize], plain: bool) -> Weight {
        let stand_in = Tensor { name: name.into(), ty: TensorType::F32, ne: ne.to_vec() };
        let Some((index, tensor)) = self.find(name) else {
            self.tensor_error(name, format!("a tensor of shape {ne:?}"), "no such tensor".into());
            return Weight::whole(0, &stand_in);
        };
        let significant = |ne: &[usize]| ne[..ne.iter().rposition(|&d| d != 1).map_or(0, |last| last + 1)].to_vec();
        let mut sound = true;
        if significant(&tensor.ne) != significant(ne) {
            self.tensor_error(name, format!("shape {ne:?}"), format!("shape {:?}", tensor.ne));
            sound = false;
        }
        if plain && tensor.ty != TensorType::F32 {
            self.tensor_error(name, "type F32".into(), format!("type {}", tensor.ty));
            sound = false;
        } else if !tensor.ty.is_supported() {
            let supported: Vec<_> = TYPES.iter().filter(|row| row.ty.is_supported()).map(|row| row.name).collect();
            self.tensor_error(name, format!("a type of {}", supported.join(", ")), format!("type {}", tensor.ty));
            sound = false;
        }
        Weight::whole(index, if sound { tensor } else { &stand_in })
    }

    /// The F32 vector `name` `[n]`.
    pub(super) fn vector(&mut self, name: &str, n: usize) -> Weight {
        self.tensor(name, &[n], true)
    }

    /// The F32 vector `name` `[n]`, if the file has it.
    pub(super) fn optional_vector(&mut self, name: &str, n: usize) -> Option<Weight> {
        self.find(name).map(|_| self.vector(name, n))
    }

    /// The F32 matrix `name` `[n_out, n_in]`.
    pub(super) fn plain_matrix(&mut self, name: &str, n_in: usize, n_out: usize) -> Weight {
        self.tensor(name, &[n_in, n_out], true)
    }

    /// The matrix `name` `[n_out, n_in]` of any supported type.
    pub(super) fn matrix(&mut self, name: &str, n_in: usize, n_out: usize) -> Weight {
        self.tensor(name, &[n_in, n_out], false)
    }

    /// The projection `{name}.weight` `[n_out, n_in]` with its `.scale` and `.bias`, where the file has them.
    pub(super) fn linear(&mut self, name: &str, n_in: usize, n_out: usize) -> Linear<Weight> {
        Linear {
            weight: self.matrix(&format!("{name}.weight"), n_in, n_out),
            scale: self.optional_vector(&format!("{name}.scale"), 1),
            bias: self.optional_vector(&format!("{name}.bias"), n_out),
        }
    }

    /// The stack of experts `{name}.weight` `[n_experts * n_out, n_in]`, with the scales `{scale}.scale`
    /// `[n_experts]` where the file has them. Stacks have no biases.
    pub(super) fn stack(
        &mut self,
        name: &str,
        scale: &str,
        n_in: usize,
        n_out: usize,
        n_experts: usize,
    ) -> Linear<Weight> {
        let bias = format!("{name}.bias");
        if self.find(&bias).is_some() {
            self.tensor_error(&bias, "experts without biases".into(), "such a tensor".into());
        }
        Linear {
            weight: self.tensor(&format!("{name}.weight"), &[n_in, n_out, n_experts], false),
            scale: self.optional_vector(&format!("{scale}.scale"), n_experts),
            bias: None,
        }
    }

    /// Checks that every token of the vocabulary has one of the `n_vocab` rows of the embedding; more rows may exist.
    pub(super) fn check_tokens(&mut self, n_vocab: usize) {
        const KEY: &str = "tokenizer.ggml.tokens";
        let metadata = self.file.metadata();
        if let Some(Some(tokens)) = self.problems.keep(metadata.get::<crate::gguf::Strings>(KEY))
            && tokens.len() > n_vocab
        {
            let expected = format!("at most {n_vocab} tokens, the rows of token_embd.weight");
            self.problems.push(metadata.error(KEY, expected, tokens.len().to_string()));
        }
    }

    /// Reports every tensor of a layer that `n_all` layers do not have: to leave it out would change the model.
    pub(super) fn refuse_layers_from(&mut self, n_all: usize) {
        for tensor in self.file.tensors() {
            let layer = tensor.name.strip_prefix("blk.").and_then(|rest| rest.split('.').next());
            if let Some(layer) = layer
                && layer.parse::<usize>().map_or(true, |layer| layer >= n_all)
            {
                let expected = format!("blocks 0 to {}, as {} says", n_all - 1, self.key("block_count"));
                self.tensor_error(&tensor.name, expected, format!("block {}", crate::gguf::quoted(layer.as_bytes())));
            }
        }
    }
}

/// Rows `rows` of a fused projection, with its scale and the same part of its bias.
pub(super) fn part(fused: &Linear<Weight>, rows: impl Iterator<Item = Range<usize>> + Clone) -> Linear<Weight> {
    // A bias is one row; its slice is rows of one element.
    let elements = |w: &Weight| Weight { n_cols: 1, file_cols: 1, ..w.clone() }.with_rows(rows.clone());
    Linear {
        weight: fused.weight.clone().with_rows(rows.clone()),
        scale: fused.scale.clone(),
        bias: fused.bias.as_ref().map(elements),
    }
}
