//! Compiles a system-call filter to BPF that is cheap to install.
//!
//! When a filter is installed the kernel tries it with the number of each system call there is, to know which ones need
//! no second look, and translates it to machine code. Most of our threads make few calls before they are gone, so that
//! the trial costs more than it saves: a filter begins with a statement that ends it. Then what counts is how few
//! statements there are: numbers are compared one after the other, in the order of the file, what follows for them is
//! shared, and an argument is loaded once. A test holds the result against what seccompiler makes of the same file.
//!
//! ```text
//!  architecture ─▶ number ─┬─▶ arguments of that call ─┬─▶ allow
//!                          └──────────────┬────────────┴─▶ trap
//! ```

use std::error::Error;

use serde_json::Value;

use super::syscalls;

/// `struct sock_filter` (linux/filter.h).
#[derive(Debug, Clone, Copy)]
pub struct Statement {
    pub code: u16,
    pub jt: u8,
    pub jf: u8,
    pub k: u32,
}

/// Load a number, load a word of `struct seccomp_data`, mask it, compare it, end (linux/bpf_common.h).
const LOAD_INDEX: u16 = 0x01;
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

/// Offsets in `struct seccomp_data`, and what a filter returns (linux/seccomp.h).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;
const ALLOW: u32 = 0x7fff_0000;
const TRAP: u32 = 0x0003_0000;
const KILL_PROCESS: u32 = 0x8000_0000;
/// `AUDIT_ARCH_X86_64` (linux/audit.h).
const X86_64: u32 = 0xc000_003e;

/// The lower half of argument `index`, masked, must be `value`.
struct Condition {
    index: u32,
    mask: u32,
    value: u32,
}

/// All conditions must hold.
type Rule = Vec<Condition>;
/// A system call's number, and the rules of which one must hold.
type Call = (u32, Vec<Rule>);

/// Where a jump leads. All lead forward.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Next,
    Allow,
    Trap,
    Label(usize),
}

#[derive(Clone, Copy)]
struct Jump {
    code: u16,
    k: u32,
    yes: Target,
    no: Target,
}

/// A program whose jumps are not resolved yet.
#[derive(Default)]
struct Program {
    statements: Vec<Jump>,
    /// The statement that each label stands before.
    labels: Vec<usize>,
}

impl Program {
    fn push(&mut self, code: u16, k: u32, yes: Target, no: Target) {
        self.statements.push(Jump { code, k, yes, no });
    }

    fn label(&mut self) -> usize {
        self.labels.push(usize::MAX);
        self.labels.len() - 1
    }

    fn place(&mut self, label: usize) {
        self.labels[label] = self.statements.len();
    }

    /// Decides about the arguments of a call.
    fn examine(&mut self, rules: &[Rule]) {
        let mut loaded = None;
        for (index, rule) in rules.iter().enumerate() {
            let last = index + 1 == rules.len();
            let next = if last { Target::Trap } else { Target::Label(self.label()) };
            for (position, condition) in rule.iter().enumerate() {
                if loaded != Some((condition.index, condition.mask)) {
                    self.push(LOAD, ARGUMENTS + 8 * condition.index, Target::Next, Target::Next);
                    if condition.mask != u32::MAX {
                        self.push(AND, condition.mask, Target::Next, Target::Next);
                    }
                }
                loaded = Some((condition.index, condition.mask));
                let yes = if position + 1 == rule.len() { Target::Allow } else { Target::Next };
                self.push(JUMP_EQUAL, condition.value, yes, next);
            }
            // After more than one condition it depends on which of them did not hold.
            loaded = loaded.filter(|_| rule.len() == 1);
            if let Target::Label(label) = next {
                self.place(label);
            }
        }
    }

    /// Resolves the jumps.
    fn finish(self) -> Result<Vec<Statement>, Box<dyn Error>> {
        let (allow, trap) = (self.statements.len(), self.statements.len() + 1);
        let distance = |from: usize, target: Target| {
            let to = match target {
                Target::Next => from + 1,
                Target::Allow => allow,
                Target::Trap => trap,
                Target::Label(label) => self.labels[label],
            };
            u8::try_from(to - from - 1)
        };
        let mut statements = Vec::new();
        for (at, &Jump { code, k, yes, no }) in self.statements.iter().enumerate() {
            let jumps = code == JUMP_EQUAL;
            let (jt, jf) = if jumps { (distance(at, yes)?, distance(at, no)?) } else { (0, 0) };
            statements.push(Statement { code, jt, jf, k });
        }
        statements.extend([ALLOW, TRAP].map(|k| Statement { code: RETURN, jt: 0, jf: 0, k }));
        Ok(statements)
    }
}

/// Compiles the filter of one kind of thread, without the rules whose reasons end with `other`: what another libc needs.
pub fn compile(filter: &Value, other: &str) -> Result<Vec<Statement>, Box<dyn Error>> {
    if filter["match_action"] != "allow" || filter["mismatch_action"] != "trap" {
        return Err("its actions must be allow and trap".into());
    }
    let calls = parse(filter, other)?;
    let mut program = Program::default();
    program.push(LOAD_INDEX, 0, Target::Next, Target::Next);
    program.push(LOAD, ARCHITECTURE, Target::Next, Target::Next);
    let right = program.label();
    program.push(JUMP_EQUAL, X86_64, Target::Label(right), Target::Next);
    program.push(RETURN, KILL_PROCESS, Target::Next, Target::Next);
    program.place(right);
    program.push(LOAD, NUMBER, Target::Next, Target::Next);
    let mut examined = Vec::new();
    for (index, (number, rules)) in calls.iter().enumerate() {
        let target = if rules.iter().any(Vec::is_empty) {
            Target::Allow
        } else {
            let label = program.label();
            examined.push((label, rules));
            Target::Label(label)
        };
        let no = if index + 1 == calls.len() { Target::Trap } else { Target::Next };
        program.push(JUMP_EQUAL, *number, target, no);
    }
    for (label, rules) in examined {
        program.place(label);
        program.examine(rules);
    }
    program.finish()
}

/// The rules for each system call, in the order of the file.
fn parse(filter: &Value, other: &str) -> Result<Vec<Call>, Box<dyn Error>> {
    let mut calls = Vec::<Call>::new();
    for rule in filter["filter"].as_array().ok_or("there are no rules")? {
        if rule["comment"].as_str().ok_or("a rule without a reason")?.ends_with(other) {
            continue;
        }
        let name = rule["syscall"].as_str().ok_or("a rule without a system call")?;
        let number = (0..1024).find(|number| syscalls::name(i64::from(*number)) == Some(name));
        let number = number.ok_or_else(|| format!("{name} is no system call"))?;
        let conditions = rule["args"].as_array().map(Vec::as_slice).unwrap_or_default();
        let conditions = conditions.iter().map(|argument| condition(argument).ok_or(format!("{name}: {argument}")));
        let rule = conditions.collect::<Result<_, _>>()?;
        match calls.iter_mut().find(|call| call.0 == number) {
            Some((_, rules)) => rules.push(rule),
            None => calls.push((number, vec![rule])),
        }
    }
    Ok(calls)
}

/// Of those that seccompiler knows, the ones that are in use: the lower half equals something, all or masked.
fn condition(argument: &Value) -> Option<Condition> {
    let mask = match &argument["op"] {
        op if op == "eq" => u32::MAX,
        op => u32::try_from(op["masked_eq"].as_u64()?).ok()?,
    };
    let value = u32::try_from(argument["val"].as_u64()?).ok()?;
    let index = u32::try_from(argument["index"].as_u64()?).ok().filter(|index| *index < 6)?;
    (argument["type"] == "dword").then_some(Condition { index, mask, value })
}
