//! Compiles a system-call filter to BPF that is cheap to install.
//!
//! When a filter is installed the kernel tries it with the number of each system call there is, to know which ones need
//! no second look, and translates it to machine code. Most of our threads make few calls before they are gone, so that
//! the trial costs more than it saves: a filter begins with a statement that ends it. Then what counts is how many
//! instructions there are (neighbouring numbers are compared at once, an argument is loaded once) and how often the
//! translation goes over them ([`passes`]): of many layouts the cheapest is taken. A test holds the result against what
//! seccompiler makes of the same file.
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

/// Load a number, load a word of `struct seccomp_data`, change it, compare it, end (linux/bpf_common.h).
const LOAD_INDEX: u16 = 0x01;
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
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
/// How many layouts are tried.
const LAYOUTS: usize = 1000;

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
        // Where more than one has the top bit, they come last, and are compared without it after the argument lost it.
        let (bare, topped) = rules.iter().partition::<Vec<_>, _>(|rule| rule.iter().all(|part| part.value & TOP == 0));
        let turn = topped.len() > 1;
        for (index, rule) in bare.into_iter().chain(topped).enumerate() {
            let last = index + 1 == rules.len();
            let next = if last { Target::Trap } else { Target::Label(self.label()) };
            for (position, &Condition { index, mask, value }) in rule.iter().enumerate() {
                if !matches!(loaded, Some((same, with, _)) if (same, with) == (index, mask)) {
                    self.push(LOAD, ARGUMENTS + 8 * index, Target::Next, Target::Next);
                    if mask != u32::MAX {
                        self.push(AND, mask, Target::Next, Target::Next);
                    }
                    loaded = Some((index, mask, 0));
                }
                let turned = loaded.map_or(0, |(_, _, turned)| turned);
                if turn && (value ^ turned) & TOP != 0 {
                    self.push(XOR, TOP, Target::Next, Target::Next);
                    loaded = Some((index, mask, turned ^ TOP));
                }
                let yes = if position + 1 == rule.len() { Target::Allow } else { Target::Next };
                self.push(JUMP_EQUAL, if turn { value & !TOP } else { value }, yes, next);
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
    let (free, mut examined) = calls.iter().partition::<Vec<&Call>, _>(|(_, rules)| rules.iter().any(Vec::is_empty));
    let free: Vec<_> = free.into_iter().map(|(number, _)| *number).collect();
    let mut random = 0_u64;
    let mut draw = || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        random >> 33
    };
    let mut best = None;
    for _ in 0..LAYOUTS {
        examined.sort_by_cached_key(|_| draw());
        let gap = (usize::try_from(draw())? % examined.len().max(1), usize::try_from(draw())? % 5);
        let program = lay_out(&free, &examined, gap)?;
        let cost = (passes(&program) + 1) * program.len();
        if best.as_ref().is_none_or(|(least, _)| cost < *least) {
            best = Some((cost, program));
        }
    }
    Ok(best.map(|(_, program)| program).unwrap_or_default())
}

/// The program that lets the numbers in `free` pass and looks at the arguments of the others in this order. Before those
/// of the call at `gap.0` stand `gap.1` statements that are never reached: a gap can keep jumps from getting short one
/// after the other, pass by pass.
fn lay_out(free: &[u32], examined: &[&Call], gap: (usize, usize)) -> Result<Vec<Statement>, Box<dyn Error>> {
    let mut program = Program::default();
    program.push(LOAD_INDEX, 0, Target::Next, Target::Next);
    program.push(LOAD, ARCHITECTURE, Target::Next, Target::Next);
    let right = program.label();
    program.push(JUMP_EQUAL, X86_64, Target::Label(right), Target::Next);
    program.push(RETURN, KILL_PROCESS, Target::Next, Target::Next);
    program.place(right);
    program.push(LOAD, NUMBER, Target::Next, Target::Next);
    let mut sorted = free.to_vec();
    sorted.sort_unstable();
    let runs = sorted.chunk_by(|number, next| number + 1 == *next).filter(|run| run.len() > 2);
    for run in runs.clone() {
        let (others, first, last) = (program.label(), run[0], run[run.len() - 1]);
        program.push(JUMP_GREATER, last, Target::Label(others), Target::Next);
        program.push(JUMP_GREATER_OR_EQUAL, first, Target::Allow, Target::Next);
        program.place(others);
    }
    let mut labels = Vec::new();
    for (number, _) in examined {
        let label = program.label();
        program.push(JUMP_EQUAL, *number, Target::Label(label), Target::Next);
        labels.push(label);
    }
    for number in free.iter().filter(|number| !runs.clone().any(|run| run.contains(number))) {
        program.push(JUMP_EQUAL, *number, Target::Allow, Target::Next);
    }
    program.statements.last_mut().ok_or("it allows nothing")?.no = Target::Trap;
    for (index, ((_, rules), label)) in examined.iter().zip(labels).enumerate() {
        for _ in 0..if gap.0 == index { gap.1 } else { 0 } {
            program.push(RETURN, TRAP, Target::Next, Target::Next);
        }
        program.place(label);
        program.examine(rules);
    }
    program.finish()
}

/// How often the kernel goes over a program until the translation gets no shorter (bpf_int_jit_compile() of Linux 6.12):
/// a jump is short if it leads no farther than [`NEAR`], and how far it leads is known from the pass before.
fn passes(program: &[Statement]) -> usize {
    /// In bytes, of a jump forward.
    const NEAR: usize = 123;
    /// Bytes, without what a long jump takes more; that, and the statement where it leads.
    type Instruction = (usize, Option<(usize, usize)>);
    let mut instructions = Vec::<Instruction>::new();
    let mut begins = Vec::new();
    for (at, &Statement { code, jt, jf, k }) in program.iter().enumerate() {
        begins.push(instructions.len());
        let (yes, no) = (at + 1 + usize::from(jt), at + 1 + usize::from(jf));
        match code {
            LOAD_INDEX | LOAD => instructions.push((3, None)),
            AND | XOR => instructions.push((if i8::try_from(k.cast_signed()).is_ok() { 3 } else { 5 }, None)),
            RETURN => instructions.extend([(5, None); 2]),
            _ => {
                let compare = match k {
                    1..128 => 4,
                    128..TOP => 7,
                    0 | TOP.. => 3,
                };
                if k >= TOP {
                    instructions.push((5, None));
                }
                instructions.push((compare + 2, Some((4, if jt > 0 { yes } else { no }))));
                if jt > 0 && jf > 0 {
                    instructions.push((2, Some((3, no))));
                }
            }
        }
    }
    let mut ends: Vec<usize> = (1..=instructions.len()).map(|number| 64 * number).collect();
    for pass in 1.. {
        let mut end = 0;
        let place = |(at, &(bytes, jump)): (usize, &Instruction)| {
            let far = jump.filter(|&(_, statement)| ends[begins[statement] - 1] - ends[at] > NEAR);
            end += bytes + far.map_or(0, |(more, _)| more);
            end
        };
        let next: Vec<_> = instructions.iter().enumerate().map(place).collect();
        if next.last() == ends.last() {
            return pass;
        }
        ends = next;
    }
    unreachable!("a translation that only gets shorter ends")
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
