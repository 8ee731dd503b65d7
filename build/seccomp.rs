//! Compiles a system-call filter to BPF that is cheap to install.
//!
//! When a filter is installed the kernel runs it once for every system call there is, to know which ones need no second
//! look, and translates it to machine code: what counts is how few statements there are, and how few of them decide about
//! a number. So a number is found by the cheapest mix of bisection and comparison, what follows for it is shared, and an
//! argument is loaded once. A thread that makes few calls, or mostly one whose arguments are looked at, gains nothing by
//! that trial: its filter begins with a statement that ends it. A test holds the result against what seccompiler makes of
//! the same file.
//!
//! ```text
//!  architecture ─▶ number ─┬─▶ arguments of that call ─┬─▶ allow
//!                          └──────────────┬────────────┴─▶ trap
//! ```

use std::collections::BTreeMap;
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

/// The lower half of argument `index`, masked, must be `value`.
struct Condition {
    index: u32,
    mask: u32,
    value: u32,
}

/// All conditions must hold.
type Rule = Vec<Condition>;

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

    /// Decides about the numbers of `ranges[from..to]`, which are two ranges or more.
    fn decide(&mut self, ranges: &Ranges, from: usize, to: usize) {
        let Some(at) = ranges.plan[&(from, to)].split else {
            let numbers: Vec<_> = ranges.accepted(from, to).collect();
            for (index, (number, target)) in numbers.iter().enumerate() {
                let no = if index + 1 == numbers.len() { Target::Trap } else { Target::Next };
                self.push(JUMP_EQUAL, *number, *target, no);
            }
            return;
        };
        let right = if at + 1 == to { ranges.starts[at].1 } else { Target::Label(self.label()) };
        let left = if from + 1 == at { ranges.starts[from].1 } else { Target::Next };
        self.push(JUMP_GREATER_OR_EQUAL, ranges.starts[at].0, right, left);
        if from + 1 < at {
            self.decide(ranges, from, at);
        }
        if let (true, Target::Label(label)) = (at + 1 < to, right) {
            self.place(label);
            self.decide(ranges, at, to);
        }
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
            let jumps = matches!(code, JUMP_EQUAL | JUMP_GREATER_OR_EQUAL);
            let (jt, jf) = if jumps { (distance(at, yes)?, distance(at, no)?) } else { (0, 0) };
            statements.push(Statement { code, jt, jf, k });
        }
        statements.extend([ALLOW, TRAP].map(|k| Statement { code: RETURN, jt: 0, jf: 0, k }));
        Ok(statements)
    }
}

/// What a statement costs when it is translated, in the time that it takes to run it once.
const TRANSLATE: u32 = 100;
/// Numbers below this one are tried when a filter is installed.
const NUMBERS: u32 = 512;

/// All numbers, divided by what follows for them.
struct Ranges {
    /// The first number of each range, and what follows.
    starts: Vec<(u32, Target)>,
    /// Whether the kernel tries each number.
    tried: bool,
    /// How to decide about those from one range up to another.
    plan: BTreeMap<(usize, usize), Plan>,
}

/// Where to split some ranges, if they are not told apart by comparing with each number that is accepted.
struct Plan {
    split: Option<usize>,
    cost: u32,
}

impl Ranges {
    /// Finds the cheapest plan by that of all parts, the small ones first.
    fn new(starts: Vec<(u32, Target)>, tried: bool) -> Self {
        let mut ranges = Self { starts, tried, plan: BTreeMap::new() };
        let count = ranges.starts.len();
        for length in 1..=count {
            for from in 0..=count - length {
                let to = from + length;
                let plan = ranges.cheapest(from, to);
                ranges.plan.insert((from, to), plan);
            }
        }
        ranges
    }

    fn cheapest(&self, from: usize, to: usize) -> Plan {
        if from + 1 == to {
            return Plan { split: None, cost: 0 };
        }
        let end = self.starts.get(to).map_or(NUMBERS, |next| next.0);
        let tried = if self.tried { end.saturating_sub(self.starts[from].0) } else { 0 };
        let statement = TRANSLATE + tried;
        let accepted = self.accepted(from, to).map(|_| 1).sum::<u32>();
        let compare = Plan { split: None, cost: accepted * statement };
        let split =
            |at| Plan { split: Some(at), cost: statement + self.plan[&(from, at)].cost + self.plan[&(at, to)].cost };
        (from + 1..to).map(split).chain([compare]).min_by_key(|plan| plan.cost).unwrap_or(Plan { split: None, cost: 0 })
    }

    /// Each number that is not refused.
    fn accepted(&self, from: usize, to: usize) -> impl Iterator<Item = (u32, Target)> {
        (from..to).filter(|at| self.starts[*at].1 != Target::Trap).flat_map(move |at| {
            let end = self.starts.get(at + 1).map_or(NUMBERS, |next| next.0);
            (self.starts[at].0..end).map(move |number| (number, self.starts[at].1))
        })
    }
}

/// Compiles the filter of one kind of thread; `tried` unless the kernel's trial of it shall end at once.
pub fn compile(filter: &Value, tried: bool) -> Result<Vec<Statement>, Box<dyn Error>> {
    if filter["match_action"] != "allow" || filter["mismatch_action"] != "trap" {
        return Err("its actions must be allow and trap".into());
    }
    let calls = parse(filter)?;
    let mut program = Program::default();
    if !tried {
        program.push(LOAD_INDEX, 0, Target::Next, Target::Next);
    }
    program.push(LOAD, ARCHITECTURE, Target::Next, Target::Next);
    let right = program.label();
    program.push(JUMP_EQUAL, X86_64, Target::Label(right), Target::Next);
    program.push(RETURN, KILL_PROCESS, Target::Next, Target::Next);
    program.place(right);
    program.push(LOAD, NUMBER, Target::Next, Target::Next);

    let mut ranges = vec![(0, Target::Trap)];
    let mut examined = Vec::new();
    for (number, rules) in &calls {
        let target = if rules.iter().any(Vec::is_empty) {
            Target::Allow
        } else {
            let label = program.label();
            examined.push((label, rules));
            Target::Label(label)
        };
        // The gap before it, if there is one, is refused.
        if ranges.last().is_some_and(|last| last.0 == *number) {
            ranges.pop();
        }
        if ranges.last().is_none_or(|last| last.1 != target) {
            ranges.push((*number, target));
        }
        ranges.push((number + 1, Target::Trap));
    }
    let ranges = Ranges::new(ranges, tried);
    program.decide(&ranges, 0, ranges.starts.len());
    for (label, rules) in examined {
        program.place(label);
        program.examine(rules);
    }
    program.finish()
}

/// The rules for each system call.
fn parse(filter: &Value) -> Result<BTreeMap<u32, Vec<Rule>>, Box<dyn Error>> {
    let mut calls = BTreeMap::<u32, Vec<Rule>>::new();
    for rule in filter["filter"].as_array().ok_or("there are no rules")? {
        let name = rule["syscall"].as_str().ok_or("a rule without a system call")?;
        let number = (0..1024).find(|number| syscalls::name(i64::from(*number)) == Some(name));
        let number = number.ok_or_else(|| format!("{name} is no system call"))?;
        let conditions = rule["args"].as_array().map(Vec::as_slice).unwrap_or_default();
        let conditions = conditions.iter().map(|argument| condition(argument).ok_or(format!("{name}: {argument}")));
        calls.entry(number).or_default().push(conditions.collect::<Result<_, _>>()?);
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
