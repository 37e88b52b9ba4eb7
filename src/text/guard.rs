//! Chat templates come from strangers' files, and the template engine bounds only the number of its
//! instructions: one instruction can build a string of any length or walk a sequence that never ends. This
//! file rewrites the syntax tree of a template so that every operation whose cost depends on its operands
//! asks a [`Budget`] first. It refuses the statements that no chat template needs (`filter`, `autoescape`,
//! inheritance, imports).
//!
//! The names of the functions that the rewritten tree calls end in `!`, which no template can write.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use minijinja::machinery::Span;
use minijinja::machinery::ast::*;
use minijinja::value::{Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

/// Levels of nested statements and expressions in a template.
const NESTING_MAX: usize = 200;
/// Levels of nested lists and maps in a value.
const DEPTH_MAX: usize = 64;
/// Largest integer that a filter, a method or `range` takes.
const INTEGER_MAX: i64 = 1 << 16;

/// What reading an element of a list or map costs, in bytes of text that are read in the same time.
const ELEMENT_WORK: i64 = 256;
/// Bytes of an element of a list or map.
const ELEMENT_BYTES: i64 = 32;

/// What one rendering may cost.
#[derive(Debug)]
pub(super) struct Budget {
    /// Bytes of text, and [`ELEMENT_WORK`] for an element, that operations may still read.
    work: AtomicI64,
    /// Bytes of text, and [`ELEMENT_BYTES`] for an element, that operations may still make.
    memory: AtomicI64,
    /// Bound on the size of the subject times the largest argument, for operations like `replace`.
    product: i64,
}

impl Budget {
    /// The budget of a template that gets `bytes` in `messages`: far above what any chat template uses.
    pub(super) fn new(bytes: usize, messages: usize) -> Arc<Self> {
        let bytes = (bytes + 256 * messages) as i64;
        Arc::new(Self {
            work: AtomicI64::new((1 << 28) + 1024 * bytes),
            memory: AtomicI64::new((1 << 22) + 16 * bytes),
            product: (1 << 26) + 64 * bytes,
        })
    }

    fn spend(account: &AtomicI64, amount: i64) -> Result<(), Error> {
        match account.fetch_sub(amount, Ordering::Relaxed) >= amount {
            true => Ok(()),
            false => Err(refused("it does too much work or makes too much text")),
        }
    }

    /// Walks all of `value`, paying for it. Returns its size.
    fn read(&self, value: &Value, depth: usize) -> Result<i64, Error> {
        if depth > DEPTH_MAX {
            return Err(refused(format!("a value is nested more than {DEPTH_MAX} levels deep")));
        }
        let mut size = ELEMENT_WORK + text_len(value);
        Self::spend(&self.work, size)?;
        if matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
            let is_map = value.kind() == ValueKind::Map;
            for item in value.try_iter()? {
                size += self.read(&item, depth + 1)?;
                if is_map {
                    size += self.read(&value.get_item(&item)?, depth + 1)?;
                }
            }
        }
        Ok(size)
    }

    /// A copy of `value` for a place that outlives the statement, down to what cannot change: a namespace that held
    /// itself, or a loop that did, would never be freed. Macros are let go of by the engine.
    fn kept(&self, value: &Value) -> Result<Value, Error> {
        fn copy(value: &Value) -> Result<Value, Error> {
            let kind = value.as_object().map_or("", |object| object.type_name());
            match value.kind() {
                _ if kind.ends_with("::Namespace") => Err(refused("a namespace is kept in another or in itself")),
                _ if kind.ends_with("::Macro") => Ok(value.clone()),
                ValueKind::Map => {
                    let pair = |key: Value| Ok((key.clone(), copy(&value.get_item(&key)?)?));
                    Ok(value.try_iter()?.map(pair).collect::<Result<Vec<_>, Error>>()?.into_iter().collect())
                }
                ValueKind::Seq | ValueKind::Iterable => {
                    let items: Result<Vec<Value>, Error> = value.try_iter()?.map(|item| copy(&item)).collect();
                    Ok(Value::from(items?))
                }
                _ if kind.is_empty() => Ok(value.clone()),
                found => Err(refused(format!("a value of type {found} is kept"))),
            }
        }
        self.read(value, 0)?;
        copy(value)
    }

    /// Pays for a value that was just made. Its elements were paid for before.
    fn made(&self, value: &Value) -> Result<(), Error> {
        let elements = value.len().filter(|_| value.as_str().is_none()).unwrap_or(0);
        let elements = i64::try_from(elements).unwrap_or(i64::MAX).saturating_mul(ELEMENT_BYTES);
        Self::spend(&self.memory, text_len(value).saturating_add(elements))
    }

    /// Pays for an operation that reads `subject` and `arguments` and may take time and make text in
    /// proportion to their product.
    fn operation(&self, subject: &Value, arguments: &[Value]) -> Result<(), Error> {
        let size = self.read(subject, 0)?;
        for argument in arguments {
            integer(argument)?;
            // Keyword arguments come as a map.
            if argument.kind() == ValueKind::Map {
                for key in argument.try_iter()? {
                    integer(&argument.get_item(&key)?)?;
                }
            }
            // What the argument itself costs to look at makes no text.
            let factor = (self.read(argument, 0)? - ELEMENT_WORK).max(argument.as_i64().unwrap_or(0));
            if size.saturating_mul(factor) > self.product {
                return Err(refused("an operation would make too much text"));
            }
        }
        Ok(())
    }

    /// Adds the functions that a rewritten template calls.
    pub(super) fn install(self: &Arc<Self>, env: &mut Environment<'_>) {
        let budget = self.clone();
        env.add_filter("operand!", move |value: Value| budget.read(&value, 0).map(|_| value));
        let budget = self.clone();
        env.add_filter("kept!", move |value: Value| budget.kept(&value));
        let budget = self.clone();
        env.add_filter("container!", move |value: Value| {
            Self::spend(&budget.work, text_len(&value) + value.len().unwrap_or(0) as i64).map(|()| value)
        });
        let budget = self.clone();
        env.add_filter("made!", move |value: Value| budget.made(&value).map(|()| value));
        let budget = self.clone();
        env.add_filter("backwards!", move |value: Value| -> Result<Value, Error> {
            budget.read(&value, 0)?;
            let value = match value.as_str() {
                Some(text) => Value::from(text.chars().rev().collect::<String>()),
                None => {
                    let mut items: Vec<Value> = value.try_iter()?.collect();
                    items.reverse();
                    Value::from(items)
                }
            };
            budget.made(&value).map(|()| value)
        });
        env.add_filter("integer!", |value: Value| integer(&value).map(|()| value));
        env.add_filter("text!", |value: Value| value);
        let budget = self.clone();
        env.add_filter("times!", move |left: Value, right: Value| {
            let value = budget.times(&left, &right)?;
            budget.made(&value).map(|()| value)
        });
        let budget = self.clone();
        env.add_filter("apply!", move |state: &State, name: &str, subject: Value, arguments: Rest<Value>| {
            budget.operation(&subject, &arguments)?;
            let all: Vec<Value> = std::iter::once(subject).chain(arguments.0).collect();
            let value = state.apply_filter(name, &all).map_err(|error| match (error.kind(), error.detail()) {
                (ErrorKind::UnknownFilter, None) => {
                    Error::new(ErrorKind::UnknownFilter, format!("filter {name} is unknown"))
                }
                _ => error,
            })?;
            budget.made(&value).map(|()| value)
        });
        let budget = self.clone();
        env.add_function("method!", move |state: &State, subject: Value, name: &str, arguments: Rest<Value>| {
            budget.operation(&subject, &arguments)?;
            let mut arguments = arguments.0;
            if name == "changed" {
                // A loop keeps what it was asked about last.
                arguments = arguments.iter().map(|argument| budget.kept(argument)).collect::<Result<_, _>>()?;
            }
            let value = subject.call_method(state, name, &arguments)?;
            budget.made(&value).map(|()| value)
        });
        let budget = self.clone();
        env.set_formatter(move |out, _, value| {
            let size = budget.read(value, 0)?;
            Self::spend(&budget.memory, size)?;
            // As Python writes them.
            let text = match value.kind() {
                ValueKind::None => out.write_str("None"),
                ValueKind::Bool => out.write_str(if value.is_true() { "True" } else { "False" }),
                _ => write!(out, "{value}"),
            };
            text.map_err(|_| Error::from(ErrorKind::WriteFailure))
        });
    }

    /// `left * right`. A list times a number is refused: the engine makes it a sequence of any length.
    fn times(&self, left: &Value, right: &Value) -> Result<Value, Error> {
        let repeated = left.as_str().map(|s| (s, right)).or_else(|| right.as_str().map(|s| (s, left)));
        if let Some((text, times)) = repeated {
            let times = times.as_i64().ok_or_else(|| refused("a text is multiplied with what is no integer"))?.max(0);
            let size = times.saturating_mul(text.len() as i64);
            if size > self.memory.load(Ordering::Relaxed) {
                return Err(refused("an operation would make too much text"));
            }
            return Ok(Value::from(text.repeat(times as usize)));
        }
        if let (Some(a), Some(b)) = (left.as_i64(), right.as_i64()) {
            return a.checked_mul(b).map(Value::from).ok_or_else(|| refused("a product is too large"));
        }
        match (f64::try_from(left.clone()), f64::try_from(right.clone())) {
            (Ok(a), Ok(b)) => Ok(Value::from(a * b)),
            _ => Err(refused(format!("a {} times a {}", left.kind(), right.kind()))),
        }
    }
}

fn refused(why: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, why)
}

fn text_len(value: &Value) -> i64 {
    value.as_str().map_or(0, str::len) as i64
}

/// Refuses integers that no chat template uses as an argument.
fn integer(value: &Value) -> Result<(), Error> {
    let found = value.is_integer().then(|| value.as_i64().unwrap_or(i64::MAX));
    match found.filter(|n| n.unsigned_abs() > INTEGER_MAX as u64) {
        None => Ok(()),
        Some(n) => Err(refused(format!("an argument of {n}, and the most is {INTEGER_MAX}"))),
    }
}

/// Filters that look at the outside of a value only.
const CHEAP_FILTERS: &[&str] = &["length", "count", "default", "d", "first", "last", "safe"];
/// Tests that read all of a value.
const COSTLY_TESTS: &[&str] = &[
    "eq",
    "equalto",
    "==",
    "ne",
    "!=",
    "lt",
    "lessthan",
    "<",
    "le",
    "<=",
    "gt",
    "greaterthan",
    ">",
    "ge",
    ">=",
    "in",
    "startingwith",
    "endingwith",
    "containing",
    "lower",
    "upper",
];

/// The template with every costly operation guarded.
pub(super) fn rewrite<'a>(template: &Stmt<'a>) -> Result<Stmt<'a>, Error> {
    Rewriter { depth: 0 }.statement(template)
}

struct Rewriter {
    depth: usize,
}

fn filter<'a>(name: &'a str, value: Expr<'a>, args: Vec<CallArg<'a>>, span: Span) -> Expr<'a> {
    Expr::Filter(Spanned::new(Filter { name, expr: Some(value), args }, span))
}

fn wrap<'a>(name: &'static str, value: Expr<'a>) -> Expr<'a> {
    let span = value.span();
    filter(name, value, Vec::new(), span)
}

fn text<'a>(text: &str, span: Span) -> Expr<'a> {
    Expr::Const(Spanned::new(Const { value: Value::from(text) }, span))
}

impl Rewriter {
    fn deeper<T>(&mut self, inner: impl FnOnce(&mut Self) -> Result<T, Error>) -> Result<T, Error> {
        self.depth += 1;
        if self.depth > NESTING_MAX {
            return Err(Error::new(
                ErrorKind::SyntaxError,
                format!("it is nested more than {NESTING_MAX} levels deep"),
            ));
        }
        let result = inner(self);
        self.depth -= 1;
        result
    }

    fn statements<'a>(&mut self, statements: &[Stmt<'a>]) -> Result<Vec<Stmt<'a>>, Error> {
        statements.iter().map(|statement| self.statement(statement)).collect()
    }

    fn statement<'a>(&mut self, statement: &Stmt<'a>) -> Result<Stmt<'a>, Error> {
        self.deeper(|this| this.statement_inner(statement))
    }

    fn statement_inner<'a>(&mut self, statement: &Stmt<'a>) -> Result<Stmt<'a>, Error> {
        Ok(match statement {
            Stmt::Template(s) => {
                Stmt::Template(Spanned::new(Template { children: self.statements(&s.children)? }, s.span()))
            }
            Stmt::EmitExpr(s) => Stmt::EmitExpr(Spanned::new(EmitExpr { expr: self.expr(&s.expr)? }, s.span())),
            // Through the formatter, which counts.
            Stmt::EmitRaw(s) => {
                let expr = wrap("text!", text(s.raw, s.span()));
                Stmt::EmitExpr(Spanned::new(EmitExpr { expr }, s.span()))
            }
            Stmt::ForLoop(s) => Stmt::ForLoop(Spanned::new(
                ForLoop {
                    target: self.target(&s.target)?,
                    iter: self.expr(&s.iter)?,
                    filter_expr: self.optional(&s.filter_expr)?,
                    recursive: s.recursive,
                    body: self.statements(&s.body)?,
                    else_body: self.statements(&s.else_body)?,
                },
                s.span(),
            )),
            Stmt::IfCond(s) => Stmt::IfCond(Spanned::new(
                IfCond {
                    expr: self.expr(&s.expr)?,
                    true_body: self.statements(&s.true_body)?,
                    false_body: self.statements(&s.false_body)?,
                },
                s.span(),
            )),
            Stmt::WithBlock(s) => {
                let assignments = s.assignments.iter().map(|(to, value)| Ok((self.target(to)?, self.expr(value)?)));
                let assignments = assignments.collect::<Result<_, Error>>()?;
                Stmt::WithBlock(Spanned::new(WithBlock { assignments, body: self.statements(&s.body)? }, s.span()))
            }
            Stmt::Set(s) => {
                let value = self.expr(&s.expr)?;
                // An attribute, maybe one of several targets, keeps the value alive.
                let value = if matches!(s.target, Expr::Var(_)) { value } else { wrap("kept!", value) };
                Stmt::Set(Spanned::new(Set { target: self.target(&s.target)?, expr: value }, s.span()))
            }
            Stmt::SetBlock(s) if s.filter.is_none() => Stmt::SetBlock(Spanned::new(
                SetBlock { target: self.target(&s.target)?, filter: None, body: self.statements(&s.body)? },
                s.span(),
            )),
            Stmt::Macro(s) => Stmt::Macro(self.declaration(s)?),
            Stmt::CallBlock(s) => {
                let block = CallBlock { call: self.call(&s.call)?, macro_decl: self.declaration(&s.macro_decl)? };
                Stmt::CallBlock(Spanned::new(block, s.span()))
            }
            Stmt::Do(s) => Stmt::Do(Spanned::new(Do { call: self.call(&s.call)? }, s.span())),
            Stmt::Continue(s) => Stmt::Continue(Spanned::new(Continue, s.span())),
            Stmt::Break(s) => Stmt::Break(Spanned::new(Break, s.span())),
            _ => {
                return Err(Error::new(
                    ErrorKind::SyntaxError,
                    "it uses a statement that chat templates have no use for (filter, autoescape, inheritance or import)",
                ));
            }
        })
    }

    fn declaration<'a>(&mut self, s: &Spanned<Macro<'a>>) -> Result<Spanned<Macro<'a>>, Error> {
        let declared = Macro {
            name: s.name,
            args: s.args.iter().map(|arg| self.target(arg)).collect::<Result<_, _>>()?,
            defaults: s.defaults.iter().map(|value| self.expr(value)).collect::<Result<_, _>>()?,
            body: self.statements(&s.body)?,
        };
        Ok(Spanned::new(declared, s.span()))
    }

    /// What is assigned to: names, attributes, lists of them.
    fn target<'a>(&mut self, expr: &Expr<'a>) -> Result<Expr<'a>, Error> {
        self.deeper(|this| {
            Ok(match expr {
                Expr::Var(e) => Expr::Var(Spanned::new(Var { id: e.id }, e.span())),
                Expr::GetAttr(e) => {
                    Expr::GetAttr(Spanned::new(GetAttr { expr: this.target(&e.expr)?, name: e.name }, e.span()))
                }
                Expr::List(e) => {
                    let items = e.items.iter().map(|item| this.target(item)).collect::<Result<_, _>>()?;
                    Expr::List(Spanned::new(List { items }, e.span()))
                }
                other => this.expr(other)?,
            })
        })
    }

    fn optional<'a>(&mut self, expr: &Option<Expr<'a>>) -> Result<Option<Expr<'a>>, Error> {
        expr.as_ref().map(|expr| self.expr(expr)).transpose()
    }

    /// The expression for a place where all of its value is read.
    fn operand<'a>(&mut self, expr: &Expr<'a>) -> Result<Expr<'a>, Error> {
        Ok(wrap("operand!", self.expr(expr)?))
    }

    fn expr<'a>(&mut self, expr: &Expr<'a>) -> Result<Expr<'a>, Error> {
        self.deeper(|this| this.expr_inner(expr))
    }

    fn expr_inner<'a>(&mut self, expr: &Expr<'a>) -> Result<Expr<'a>, Error> {
        Ok(match expr {
            Expr::Var(e) => Expr::Var(Spanned::new(Var { id: e.id }, e.span())),
            Expr::Const(e) => Expr::Const(Spanned::new(Const { value: e.value.clone() }, e.span())),
            Expr::Slice(e) => {
                let negative = e.step.as_ref().is_some_and(is_negative);
                if e.start.is_none() && e.stop.is_none() && e.step.as_ref().is_some_and(is_minus_one) {
                    return Ok(wrap("backwards!", self.expr(&e.expr)?));
                }
                if negative {
                    let why = "a slice with a negative step other than [::-1], or with a step that is not a constant";
                    return Err(Error::new(ErrorKind::SyntaxError, why));
                }
                let mut bound = |expr: &Option<Expr<'a>>| -> Result<_, Error> {
                    Ok(self.optional(expr)?.map(|expr| wrap("integer!", expr)))
                };
                let (start, stop, step) = (bound(&e.start)?, bound(&e.stop)?, bound(&e.step)?);
                let slice = Slice { expr: wrap("container!", self.expr(&e.expr)?), start, stop, step };
                wrap("made!", Expr::Slice(Spanned::new(slice, e.span())))
            }
            Expr::UnaryOp(e) => {
                #[allow(clippy::needless_match)] // a copy of a type that is not `Copy`
                let op = match e.op {
                    UnaryOpKind::Not => UnaryOpKind::Not,
                    UnaryOpKind::Neg => UnaryOpKind::Neg,
                };
                Expr::UnaryOp(Spanned::new(UnaryOp { op, expr: self.expr(&e.expr)? }, e.span()))
            }
            Expr::BinOp(e) => match e.op {
                BinOpKind::Mul => {
                    let right = CallArg::Pos(self.expr(&e.right)?);
                    filter("times!", self.expr(&e.left)?, vec![right], e.span())
                }
                BinOpKind::Add | BinOpKind::Concat => {
                    let (left, right) = (self.operand(&e.left)?, self.operand(&e.right)?);
                    wrap("made!", Expr::BinOp(Spanned::new(BinOp { op: e.op, left, right }, e.span())))
                }
                BinOpKind::ScAnd | BinOpKind::ScOr => {
                    let (left, right) = (self.expr(&e.left)?, self.expr(&e.right)?);
                    Expr::BinOp(Spanned::new(BinOp { op: e.op, left, right }, e.span()))
                }
                _ => {
                    let (left, right) = (self.operand(&e.left)?, self.operand(&e.right)?);
                    Expr::BinOp(Spanned::new(BinOp { op: e.op, left, right }, e.span()))
                }
            },
            Expr::Compare(e) => {
                let compared = |this: &mut Self, op: &CompareOp<'a>| -> Result<_, Error> {
                    Ok(CompareOp { op: op.op, expr: this.operand(&op.expr)? })
                };
                let ops = e.ops.iter().map(|op| compared(self, op)).collect::<Result<_, _>>()?;
                Expr::Compare(Spanned::new(Compare { expr: self.operand(&e.expr)?, ops }, e.span()))
            }
            Expr::IfExpr(e) => Expr::IfExpr(Spanned::new(
                IfExpr {
                    test_expr: self.expr(&e.test_expr)?,
                    true_expr: self.expr(&e.true_expr)?,
                    false_expr: self.optional(&e.false_expr)?,
                },
                e.span(),
            )),
            Expr::Filter(e) => {
                let Some(subject) = &e.expr else {
                    return Err(Error::new(ErrorKind::SyntaxError, "a filter without a value"));
                };
                let subject = self.expr(subject)?;
                let mut args = self.args(&e.args)?;
                if CHEAP_FILTERS.contains(&e.name) {
                    return Ok(filter(e.name, subject, args, e.span()));
                }
                args.insert(0, CallArg::Pos(subject));
                filter("apply!", text(e.name, e.span()), args, e.span())
            }
            Expr::Test(e) => {
                let costly = COSTLY_TESTS.contains(&e.name);
                let subject = if costly { self.operand(&e.expr)? } else { self.expr(&e.expr)? };
                let args = if costly { self.wrapped_args("operand!", &e.args)? } else { self.args(&e.args)? };
                Expr::Test(Spanned::new(Test { name: e.name, expr: subject, args }, e.span()))
            }
            Expr::GetAttr(e) => {
                Expr::GetAttr(Spanned::new(GetAttr { expr: self.expr(&e.expr)?, name: e.name }, e.span()))
            }
            Expr::GetItem(e) => {
                let item = GetItem {
                    expr: wrap("container!", self.expr(&e.expr)?),
                    subscript_expr: self.expr(&e.subscript_expr)?,
                };
                Expr::GetItem(Spanned::new(item, e.span()))
            }
            Expr::Call(e) => Expr::Call(self.call(e)?),
            Expr::List(e) => {
                let items = e.items.iter().map(|item| self.expr(item)).collect::<Result<_, _>>()?;
                wrap("operand!", Expr::List(Spanned::new(List { items }, e.span())))
            }
            Expr::Map(e) => {
                let keys = e.keys.iter().map(|key| self.expr(key)).collect::<Result<_, _>>()?;
                let values = e.values.iter().map(|value| self.expr(value)).collect::<Result<_, _>>()?;
                wrap("operand!", Expr::Map(Spanned::new(Map { keys, values }, e.span())))
            }
        })
    }

    fn call<'a>(&mut self, e: &Spanned<Call<'a>>) -> Result<Spanned<Call<'a>>, Error> {
        let call = match &e.expr {
            Expr::GetAttr(attribute) => {
                let mut args = self.args(&e.args)?;
                args.insert(0, CallArg::Pos(text(attribute.name, e.span())));
                args.insert(0, CallArg::Pos(self.expr(&attribute.expr)?));
                Call { expr: Expr::Var(Spanned::new(Var { id: "method!" }, e.span())), args }
            }
            Expr::Var(function) => {
                let args = match function.id {
                    "range" => self.wrapped_args("integer!", &e.args)?,
                    "dict" | "namespace" => self.wrapped_args("operand!", &e.args)?,
                    _ => self.args(&e.args)?,
                };
                Call { expr: self.expr(&e.expr)?, args }
            }
            _ => Call { expr: self.expr(&e.expr)?, args: self.args(&e.args)? },
        };
        Ok(Spanned::new(call, e.span()))
    }

    fn args<'a>(&mut self, args: &[CallArg<'a>]) -> Result<Vec<CallArg<'a>>, Error> {
        self.map_args(args, &|value| value)
    }

    fn wrapped_args<'a>(&mut self, name: &'static str, args: &[CallArg<'a>]) -> Result<Vec<CallArg<'a>>, Error> {
        self.map_args(args, &|value| wrap(name, value))
    }

    fn map_args<'a>(
        &mut self,
        args: &[CallArg<'a>],
        map: &dyn Fn(Expr<'a>) -> Expr<'a>,
    ) -> Result<Vec<CallArg<'a>>, Error> {
        let args = args.iter().map(|arg| {
            Ok(match arg {
                CallArg::Pos(value) => CallArg::Pos(map(self.expr(value)?)),
                CallArg::Kwarg(name, value) => CallArg::Kwarg(name, map(self.expr(value)?)),
                // Spread into arguments: all of it is read.
                CallArg::PosSplat(value) => CallArg::PosSplat(self.operand(value)?),
                CallArg::KwargSplat(value) => CallArg::KwargSplat(self.operand(value)?),
            })
        });
        args.collect()
    }
}

/// Whether a step may be negative. `-1` is an operator and a constant in the tree.
fn is_negative(step: &Expr<'_>) -> bool {
    constant_step(step).is_none_or(|step| step < 0)
}

fn is_minus_one(step: &Expr<'_>) -> bool {
    constant_step(step) == Some(-1)
}

fn constant_step(step: &Expr<'_>) -> Option<i64> {
    match step {
        Expr::Const(c) => c.value.as_i64(),
        Expr::UnaryOp(e) if matches!((&e.op, &e.expr), (UnaryOpKind::Neg, Expr::Const(_))) => {
            constant_step(&e.expr)?.checked_neg()
        }
        _ => None,
    }
}
