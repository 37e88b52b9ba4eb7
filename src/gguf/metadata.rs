//! Metadata: typed values by key, decoded from the copied header on demand. A value is read as the type that
//! the file states; a caller that wants another type gets an error that names the key and both types.

use super::error::{Error, quoted};
use std::ops::Range;

/// Type of a metadata value or array element, by its id in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
#[repr(u32)]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    /// The type with this id.
    pub fn from_id(id: u32) -> Option<Self> {
        use ValueType::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64].into_iter().find(|t| *t as u32 == id)
    }

    /// Name as the format's description writes it.
    pub fn name(self) -> &'static str {
        use ValueType::*;
        match self {
            U8 => "u8",
            I8 => "i8",
            U16 => "u16",
            I16 => "i16",
            U32 => "u32",
            I32 => "i32",
            F32 => "f32",
            Bool => "bool",
            String => "string",
            Array => "array",
            U64 => "u64",
            I64 => "i64",
            F64 => "f64",
        }
    }

    /// Bytes of a value; `None` for strings and arrays, whose length is part of the value.
    pub fn size(self) -> Option<usize> {
        use ValueType::*;
        match self {
            U8 | I8 | Bool => Some(1),
            U16 | I16 => Some(2),
            U32 | I32 | F32 => Some(4),
            U64 | I64 | F64 => Some(8),
            String | Array => None,
        }
    }
}

/// A metadata value. Strings are bytes: token texts need not be UTF-8.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Value<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(&'a [u8]),
    Array(Array<'a>),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl<'a> Value<'a> {
    /// The scalar of type `ty` in exactly `ty.size()` bytes, or a string of all of `bytes`.
    fn decode(ty: ValueType, bytes: &'a [u8]) -> Self {
        macro_rules! number {
            ($variant:ident, $t:ty) => {
                Value::$variant(<$t>::from_le_bytes(bytes.try_into().expect("the value's own size")))
            };
        }
        match ty {
            ValueType::U8 => number!(U8, u8),
            ValueType::I8 => number!(I8, i8),
            ValueType::U16 => number!(U16, u16),
            ValueType::I16 => number!(I16, i16),
            ValueType::U32 => number!(U32, u32),
            ValueType::I32 => number!(I32, i32),
            ValueType::F32 => number!(F32, f32),
            ValueType::Bool => Value::Bool(bytes[0] != 0),
            ValueType::String => Value::String(bytes),
            ValueType::U64 => number!(U64, u64),
            ValueType::I64 => number!(I64, i64),
            ValueType::F64 => number!(F64, f64),
            ValueType::Array => unreachable!("arrays of arrays are refused when the header is read"),
        }
    }

    /// Type of the value.
    pub fn value_type(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::String(_) => ValueType::String,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// The value of any integer type.
    pub fn integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            _ => return None,
        })
    }

    /// Type and value for a message: `u32 7`, `string "abc"`, `array of 3 i32`.
    pub fn describe(&self) -> String {
        match self {
            Value::String(s) => format!("string {}", quoted(s)),
            Value::Array(a) => format!("array of {} {}", a.len, a.ty.name()),
            Value::F32(v) => format!("f32 {v}"),
            Value::F64(v) => format!("f64 {v}"),
            Value::Bool(v) => format!("bool {v}"),
            other => format!("{} {}", other.value_type().name(), other.integer().expect("the integers are left")),
        }
    }
}

/// A metadata array: elements of one type, never arrays.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Array<'a> {
    /// Type of the elements.
    pub ty: ValueType,
    /// Number of elements.
    pub len: usize,
    /// The elements as stored: `len * ty.size()` bytes, or `len` strings with their u64 lengths.
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// The elements in order.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let (ty, mut rest, mut left) = (self.ty, self.bytes, self.len);
        std::iter::from_fn(move || {
            left = left.checked_sub(1)?;
            let size = match ty.size() {
                Some(size) => size,
                None => {
                    let (len, tail) = rest.split_first_chunk::<8>().expect("walked when the header was read");
                    rest = tail;
                    u64::from_le_bytes(*len) as usize
                }
            };
            let (value, tail) = rest.split_at(size);
            rest = tail;
            Some(Value::decode(ty, value))
        })
    }
}

/// An array of strings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Strings<'a>(Array<'a>);

impl<'a> Strings<'a> {
    /// Number of strings.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// The strings in order, as bytes.
    pub fn iter(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        self.0.iter().map(|v| match v {
            Value::String(s) => s,
            _ => unreachable!("made from an array of strings"),
        })
    }
}

/// A type that a metadata value can be read as.
pub trait FromValue<'a>: Sized {
    /// What the value has to be, for messages.
    const EXPECTED: &'static str;

    /// The value, or `None` if it is something else.
    fn from_value(value: Value<'a>) -> Option<Self>;
}

macro_rules! integer {
    ($t:ty, $expected:literal) => {
        /// Any integer type whose value fits.
        impl<'a> FromValue<'a> for $t {
            const EXPECTED: &'static str = $expected;
            fn from_value(value: Value<'a>) -> Option<Self> {
                value.integer()?.try_into().ok()
            }
        }
    };
}
integer!(u32, "an integer from 0 to 4294967295");
integer!(usize, "an integer of at least 0");

/// f32 or f64.
impl<'a> FromValue<'a> for f64 {
    const EXPECTED: &'static str = "a number (f32)";
    fn from_value(value: Value<'a>) -> Option<Self> {
        match value {
            Value::F32(v) => Some(v.into()),
            Value::F64(v) => Some(v),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for bool {
    const EXPECTED: &'static str = "a bool";
    fn from_value(value: Value<'a>) -> Option<Self> {
        match value {
            Value::Bool(v) => Some(v),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for &'a str {
    const EXPECTED: &'static str = "a string of UTF-8";
    fn from_value(value: Value<'a>) -> Option<Self> {
        match value {
            Value::String(s) => std::str::from_utf8(s).ok(),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for Array<'a> {
    const EXPECTED: &'static str = "an array";
    fn from_value(value: Value<'a>) -> Option<Self> {
        match value {
            Value::Array(a) => Some(a),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for Strings<'a> {
    const EXPECTED: &'static str = "an array of strings";
    fn from_value(value: Value<'a>) -> Option<Self> {
        Array::from_value(value).filter(|a| a.ty == ValueType::String).map(Strings)
    }
}

/// Elements of 32 or 64 bits; narrower ones are refused, as no writer of these keys uses them.
impl<'a> FromValue<'a> for Vec<i32> {
    const EXPECTED: &'static str = "an array of i32";
    fn from_value(value: Value<'a>) -> Option<Self> {
        let array = Array::from_value(value)?;
        match array.ty {
            ValueType::U32 | ValueType::I32 | ValueType::U64 | ValueType::I64 => {}
            _ => return None,
        }
        array.iter().map(|v| v.integer()?.try_into().ok()).collect()
    }
}

impl<'a> FromValue<'a> for Vec<f32> {
    const EXPECTED: &'static str = "an array of f32";
    fn from_value(value: Value<'a>) -> Option<Self> {
        Array::from_value(value)?
            .iter()
            .map(|v| match v {
                Value::F32(v) => Some(v),
                _ => None,
            })
            .collect()
    }
}

impl<'a> FromValue<'a> for Vec<bool> {
    const EXPECTED: &'static str = "an array of bool";
    fn from_value(value: Value<'a>) -> Option<Self> {
        Array::from_value(value)?.iter().map(bool::from_value).collect()
    }
}

/// A key and where its value lies in the header.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    /// Type of the value, for arrays of the elements.
    pub(super) ty: ValueType,
    /// Elements of an array; `None` for other values.
    pub(super) len: Option<usize>,
    /// Bytes of the value, or of the elements of an array, in the header.
    pub(super) bytes: Range<usize>,
}

/// All keys and values of a file, in file order.
#[derive(Debug)]
pub struct Metadata {
    pub(super) file: String,
    pub(super) header: Vec<u8>,
    pub(super) entries: Vec<Entry>,
}

impl Metadata {
    /// Every key with its value, in file order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Value<'_>)> {
        self.entries.iter().map(|e| (e.key.as_str(), self.value(e)))
    }

    /// The value of `key`, of whatever type.
    pub fn value_of(&self, key: &str) -> Option<Value<'_>> {
        self.entries.iter().find(|e| e.key == key).map(|e| self.value(e))
    }

    fn value(&self, entry: &Entry) -> Value<'_> {
        let bytes = &self.header[entry.bytes.clone()];
        match entry.len {
            Some(len) => Value::Array(Array { ty: entry.ty, len, bytes }),
            None => Value::decode(entry.ty, bytes),
        }
    }

    /// The value of `key` as a `T`, or `None` if the key is absent. A value of another type is an error.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>, Error> {
        let Some(value) = self.value_of(key) else { return Ok(None) };
        match T::from_value(value) {
            Some(value) => Ok(Some(value)),
            None => Err(self.error(key, T::EXPECTED, value.describe())),
        }
    }

    /// The value of `key` as a `T`. An absent key is an error.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T, Error> {
        self.get(key)?.ok_or_else(|| self.error(key, T::EXPECTED, "no such key"))
    }

    /// Path of the file, or the name that was given with its bytes.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// An error about the value of `key`.
    pub fn error(&self, key: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::key(&self.file, key, expected, found)
    }
}
