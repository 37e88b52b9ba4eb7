//! Architectures: from the metadata and tensors of a file to a list of blocks. One file each, one row in
//! `ARCHITECTURES` for every `general.architecture` it reads. What a file leaves out, contradicts or asks for without
//! being supported is an error that names the key or tensor; nothing is replaced by a guess. Models know no device.

mod layers;
mod llama;
mod qwen2;
mod qwen3;
mod qwen35;
mod qwen3next;
mod reader;

use crate::gguf::{Error, File, Problems};
use reader::Reader;
use tandem_spec::Model;

type Read = fn(&mut Reader) -> Option<Model>;

/// `general.architecture` and what reads it.
static ARCHITECTURES: &[(&str, Read)] = &[
    ("qwen35", qwen35::read),
    ("qwen35moe", qwen35::read),
    ("qwen3next", qwen3next::read),
    ("qwen3", qwen3::read),
    ("qwen3moe", qwen3::read),
    ("qwen2", qwen2::read),
    ("llama", llama::read),
];

/// The model that `file` holds. Fails with the first problem.
pub fn describe(file: &File) -> Result<Model, Error> {
    let mut problems = Problems::default();
    examine(file, &mut problems).ok_or_else(|| problems.0.swap_remove(0))
}

/// The model that `file` holds, or `None` after reporting every problem that can be found.
pub fn examine(file: &File, problems: &mut Problems) -> Option<Model> {
    const KEY: &str = "general.architecture";
    let arch = problems.keep(file.metadata().require::<&str>(KEY))?;
    let Some((_, read)) = ARCHITECTURES.iter().find(|(name, _)| *name == arch) else {
        let names: Vec<_> = ARCHITECTURES.iter().map(|(name, _)| *name).collect();
        let found = crate::gguf::quoted(arch.as_bytes());
        problems.push(file.metadata().error(KEY, format!("one of {}", names.join(", ")), found));
        return None;
    };
    let mut reader = Reader::new(file, arch, problems);
    let model = read(&mut reader)?;
    reader.sound().then_some(model)
}
