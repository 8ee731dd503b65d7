//! Compiles a system-call filter to BPF that is cheap to install.
//!
//! When a filter is installed the kernel tries it with the number of each system call there is, to know which ones need
//! no second look, and translates it to machine code, over and over until no jump gets shorter any more. Most of our
//! threads make few calls before they are gone, so that this is most of what a filter costs. So a filter begins with a
//! statement that ends the trial; it has few statements (neighbouring numbers are compared at once, an argument is loaded
//! once); and all its jumps lead to the next statements or so far that they are long in the first translation already.
//! A test holds the result against what seccompiler makes of the same file.
//!
//! ```text
//!  architecture ─▶ number ─┬─▶ arguments of that call ─┬─▶ (gap) allow
//!                          └──────────────┬────────────┴─▶ (gap) trap
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

/// Load a number, load a word of `struct seccomp_data`, change it, compare it, end (linux/bpf_common.h).
const LOAD_INDEX: u16 = 0x01;
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const DIVIDE: u16 = 0x34;
const XOR: u16 = 0xa4;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_OR_EQUAL: u16 = 0x35;
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

/// The bit that makes a comparison take an instruction more.
const TOP: u32 = 1 << 31;
/// How many divisions are more than the 123 bytes that a jump has to lead over to be long, whatever it is about (14 bytes
/// each: bpf_jit_comp.c of Linux 6.12).
const GAP: usize = 9;

/// The lower half of argument `index`, masked, must be `value`.
#[derive(PartialEq, Eq)]
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

    fn load(&mut self, argument: u32, mask: u32) {
        self.push(LOAD, ARGUMENTS + 8 * argument, Target::Next, Target::Next);
        if mask != u32::MAX {
            self.push(AND, mask, Target::Next, Target::Next);
        }
    }

    /// Decides about the arguments of a call: one of `rules` must hold. They begin with the same conditions and end with
    /// one that differs.
    fn examine(&mut self, rules: &[&[Condition]]) -> Result<(), &'static str> {
        let firsts =
            rules.iter().map(|rule| rule.split_first()).collect::<Option<Vec<_>>>().ok_or("too short a rule")?;
        if let [(first, [_, ..]), ..] = firsts[..] {
            if firsts.iter().any(|(other, _)| *other != first) {
                return Err("its rules begin with different conditions");
            }
            self.load(first.index, first.mask);
            self.push(JUMP_EQUAL, first.value, Target::Next, Target::Trap);
            return self.examine(&firsts.iter().map(|(_, rest)| *rest).collect::<Vec<_>>());
        }
        if firsts.iter().any(|(_, rest)| !rest.is_empty()) {
            return Err("its rules are not of one length");
        }
        // Where more than one has the top bit, they come last, and are compared without it after the argument lost it.
        let (bare, topped) = firsts.iter().map(|(only, _)| *only).partition::<Vec<_>, _>(|only| only.value & TOP == 0);
        let turn = topped.len() > 1;
        let (mut loaded, mut turned) = (None, false);
        for &Condition { index, mask, value } in bare.into_iter().chain(topped) {
            if loaded != Some((index, mask)) {
                self.load(index, mask);
                (loaded, turned) = (Some((index, mask)), false);
            }
            if turn && value & TOP != 0 && !turned {
                self.push(XOR, TOP, Target::Next, Target::Next);
                turned = true;
            }
            self.push(JUMP_EQUAL, if turned { value & !TOP } else { value }, Target::Allow, Target::Next);
        }
        self.otherwise_trap();
        Ok(())
    }

    /// What the last comparison does not let pass is refused.
    fn otherwise_trap(&mut self) {
        if let Some(last) = self.statements.last_mut() {
            last.no = Target::Trap;
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
            let jumps = matches!(code, JUMP_EQUAL | JUMP_GREATER | JUMP_GREATER_OR_EQUAL);
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
    let is_free = |(_, rules): &&Call| rules.iter().any(Vec::is_empty);
    let mut free: Vec<_> = calls.iter().filter(is_free).map(|(number, _)| *number).collect();
    free.sort_unstable();
    let runs = free.chunk_by(|number, next| number + 1 == *next).filter(|run| run.len() > 2);
    let mut program = Program::default();
    program.push(LOAD_INDEX, 0, Target::Next, Target::Next);
    program.push(LOAD, ARCHITECTURE, Target::Next, Target::Next);
    let wrong = program.label();
    program.push(JUMP_EQUAL, X86_64, Target::Next, Target::Label(wrong));
    program.push(LOAD, NUMBER, Target::Next, Target::Next);
    let (mut examined, mut compared) = (Vec::new(), Vec::new());
    // In the order of the file, where what is called most comes first.
    for call in &calls {
        if compared.contains(&call.0) {
            continue;
        }
        if let Some(run) = runs.clone().find(|run| run.contains(&call.0)) {
            let (others, first, last) = (program.label(), run[0], run[run.len() - 1]);
            program.push(JUMP_GREATER, last, Target::Label(others), Target::Next);
            program.push(JUMP_GREATER_OR_EQUAL, first, Target::Allow, Target::Next);
            program.place(others);
            compared.extend(run);
            continue;
        }
        let target = if is_free(&call) {
            Target::Allow
        } else {
            examined.push((program.label(), call));
            Target::Label(program.labels.len() - 1)
        };
        program.push(JUMP_EQUAL, call.0, target, Target::Next);
    }
    program.otherwise_trap();
    program.place(wrong);
    program.push(RETURN, KILL_PROCESS, Target::Next, Target::Next);
    for (label, (number, rules)) in examined {
        program.place(label);
        let rules: Vec<_> = rules.iter().map(Vec::as_slice).collect();
        program.examine(&rules).map_err(|error| format!("call {number}: {error}"))?;
    }
    for _ in 0..GAP {
        program.push(DIVIDE, 1, Target::Next, Target::Next);
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
