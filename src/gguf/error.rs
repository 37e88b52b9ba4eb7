//! What is wrong with a file: where, what was expected, what was found. Text from the file is escaped and cut
//! before it enters a message, so that a hostile name can neither flood nor steer a terminal.

use std::fmt;

/// Where in a file something is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The file as a whole.
    File,
    /// A byte offset from the start of the file.
    Offset(u64),
    /// A metadata key.
    Key(String),
    /// A tensor.
    Tensor(String),
}

/// One thing that is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// Path of the file, or the name that was given with its bytes.
    pub file: String,
    /// Where in the file.
    pub place: Place,
    /// What belongs there.
    pub expected: String,
    /// What is there.
    pub found: String,
}

impl Error {
    /// An error about the file as a whole.
    pub fn file(file: &str, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self { file: file.into(), place: Place::File, expected: expected.into(), found: found.into() }
    }

    /// An error about the metadata key `key`.
    pub fn key(file: &str, key: &str, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self { place: Place::Key(key.into()), ..Self::file(file, expected, found) }
    }

    /// An error about the tensor `name`.
    pub fn tensor(file: &str, name: &str, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self { place: Place::Tensor(name.into()), ..Self::file(file, expected, found) }
    }

    /// An error at byte `offset`.
    pub fn offset(file: &str, offset: u64, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self { place: Place::Offset(offset), ..Self::file(file, expected, found) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.file)?;
        match &self.place {
            Place::File => {}
            Place::Offset(at) => write!(f, "at byte {at}: ")?,
            Place::Key(key) => write!(f, "key {}: ", quoted(key.as_bytes()))?,
            Place::Tensor(name) => write!(f, "tensor {}: ", quoted(name.as_bytes()))?,
        }
        write!(f, "expected {}, found {}", self.expected, self.found)
    }
}

impl std::error::Error for Error {}

/// Text from a file for a message: in quotes, control characters escaped, cut after 80 characters.
pub fn quoted(bytes: &[u8]) -> String {
    const LONGEST: usize = 80;
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(4 * LONGEST)]);
    let mut out = String::from("\"");
    out.extend(text.chars().take(LONGEST).flat_map(char::escape_debug));
    out.push('"');
    if text.chars().count() > LONGEST || bytes.len() > 4 * LONGEST {
        out.push_str(&format!("... ({} bytes)", bytes.len()));
    }
    out
}
