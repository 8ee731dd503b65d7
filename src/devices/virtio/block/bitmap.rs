//! Which sectors of a drive a layer has.

use std::collections::BTreeMap;

/// Words of a chunk.
const WORDS: usize = 512;
/// Bytes of a chunk, in memory and in a file: a page.
pub(super) const CHUNK_BYTES: u64 = WORDS as u64 * 8;
/// Sectors that a chunk is about: 16 MiB of the drive.
pub(super) const CHUNK_SECTORS: u64 = WORDS as u64 * 64;

/// A bit for each sector of 16 MiB.
type Chunk = Box<[u64; WORDS]>;

/// A bit for each sector. What is not there is all zeroes, so that it takes memory only for parts of
/// the drive that were written: at most a 4096th of its size.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Bitmap {
    chunks: BTreeMap<u64, Chunk>,
    /// Bits that are set.
    count: u64,
}

impl Bitmap {
    /// Sectors that are there.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Whether sector `start` is there, and how many sectors from it, of at most `count`, are alike.
    pub(super) fn run(&self, start: u64, count: u64) -> (bool, u64) {
        let there = self.chunks.get(&(start / CHUNK_SECTORS)).is_some_and(|chunk| bit(chunk, start % CHUNK_SECTORS));
        let (mut at, end) = (start, start.saturating_add(count));
        while at < end {
            let first = at % CHUNK_SECTORS;
            let left = CHUNK_SECTORS - first;
            let alike = match self.chunks.get(&(at / CHUNK_SECTORS)) {
                Some(chunk) => alike(chunk, first, there),
                None if there => 0,
                None => left,
            };
            at = at.saturating_add(alike);
            if alike < left {
                break;
            }
        }
        (there, at.min(end) - start)
    }

    /// Notes that `count` sectors from `start` are there.
    pub(super) fn set(&mut self, start: u64, count: u64) {
        let (mut at, end) = (start, start.saturating_add(count));
        while at < end {
            let chunk = self.chunks.entry(at / CHUNK_SECTORS).or_insert_with(|| Box::new([0; WORDS]));
            let word = &mut chunk[(at % CHUNK_SECTORS / 64) as usize];
            let step = (64 - at % 64).min(end - at);
            let mask = u64::MAX >> (64 - step) << (at % 64);
            self.count += u64::from((mask & !*word).count_ones());
            *word |= mask;
            at += step;
        }
    }

    /// Notes what `other` has as well.
    pub(super) fn merge(&mut self, other: &Self) {
        for (index, chunk) in &other.chunks {
            self.insert(*index, chunk);
        }
    }

    /// Notes the sectors of a chunk as well.
    fn insert(&mut self, index: u64, chunk: &[u64; WORDS]) {
        let mine = self.chunks.entry(index).or_insert_with(|| Box::new([0; WORDS]));
        for (mine, theirs) in mine.iter_mut().zip(chunk) {
            self.count += u64::from((theirs & !*mine).count_ones());
            *mine |= theirs;
        }
    }

    /// The chunks that differ from those of `other`, which has nothing that is not here.
    pub(super) fn beyond(&self, other: &Self) -> Self {
        if self.count == other.count {
            return Self::default();
        }
        let mut beyond = Self::default();
        for (index, chunk) in self.chunks.iter().filter(|(index, chunk)| other.chunks.get(index) != Some(chunk)) {
            beyond.insert(*index, chunk);
        }
        beyond
    }

    /// Notes nothing any more.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// The chunks in ascending order, as a file has them: where, and the bits, lowest first.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (u64, Vec<u8>)> {
        let bytes = |chunk: &Chunk| chunk.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.chunks.iter().map(move |(index, chunk)| (*index, bytes(chunk)))
    }

    /// Notes the sectors of a chunk of a file.
    pub(super) fn add_chunk(&mut self, index: u64, bytes: &[u8; CHUNK_BYTES as usize]) {
        let mut chunk = [0; WORDS];
        for (word, bytes) in chunk.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        if chunk != [0; WORDS] {
            self.insert(index, &chunk);
        }
    }

    /// The sectors below `end` that are there, as start and count, ascending; a run ends with its chunk.
    pub(super) fn runs(&self, end: u64) -> impl Iterator<Item = (u64, u64)> {
        let starts = self.chunks.keys().map(|index| index * CHUNK_SECTORS).take_while(move |start| *start < end);
        starts.flat_map(move |start| {
            let end = end.min(start + CHUNK_SECTORS);
            let mut at = start;
            std::iter::from_fn(move || {
                let (there, count) = self.run(at, end - at);
                if !there {
                    at += count;
                }
                let (there, count) = self.run(at, end - at);
                at += count;
                (there && count > 0).then_some((at - count, count))
            })
        })
    }
}

fn bit(chunk: &Chunk, at: u64) -> bool {
    chunk[(at / 64) as usize] >> (at % 64) & 1 == 1
}

/// How many bits of `chunk` from `first` on are `value`.
fn alike(chunk: &Chunk, first: u64, value: bool) -> u64 {
    let mut at = first;
    while at < CHUNK_SECTORS {
        let word = chunk[(at / 64) as usize] ^ if value { 0 } else { u64::MAX };
        let alike = u64::from((word >> (at % 64)).trailing_ones());
        at += alike;
        if alike < 64 - (at - alike) % 64 {
            break;
        }
    }
    at - first
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const END: u64 = 3 * CHUNK_SECTORS;

    /// What [`Bitmap::run`] is to say, bit by bit.
    fn run(set: &BTreeSet<u64>, start: u64, count: u64) -> (bool, u64) {
        let there = set.contains(&start);
        let alike = (start..start + count).take_while(|at| set.contains(at) == there).count();
        (there && count > 0, alike as u64)
    }

    fn range() -> impl Strategy<Value = (u64, u64)> {
        let borders = prop_oneof![0..END, Just(63), Just(64), Just(CHUNK_SECTORS - 1), Just(CHUNK_SECTORS)];
        (borders, prop_oneof![0..200u64, 0..CHUNK_SECTORS * 2])
    }

    proptest! {
        #![proptest_config(crate::generated::inputs(64))]

        #[test]
        fn a_bitmap_is_a_set_of_sectors(ranges in prop::collection::vec(range(), 0..6), asked in range()) {
            let (mut bitmap, mut set) = (Bitmap::default(), BTreeSet::new());
            for (start, count) in ranges {
                bitmap.set(start, count);
                set.extend(start..start + count);
            }
            prop_assert_eq!(bitmap.count(), set.len() as u64);
            let (there, alike) = bitmap.run(asked.0, asked.1);
            prop_assert_eq!((there && asked.1 > 0, alike), run(&set, asked.0, asked.1));
            let runs: Vec<_> = bitmap.runs(END).collect();
            prop_assert!(runs.iter().all(|(_, count)| *count > 0));
            let listed: BTreeSet<u64> = runs.iter().flat_map(|(start, count)| *start..start + count).collect();
            prop_assert_eq!(listed, set.into_iter().filter(|at| *at < END).collect());

            let mut read = Bitmap::default();
            for (index, bytes) in bitmap.chunks() {
                read.add_chunk(index, bytes.first_chunk().unwrap());
            }
            prop_assert_eq!(&read, &bitmap);
        }

        #[test]
        fn what_is_beyond_another_completes_it(
            first in prop::collection::vec(range(), 0..4), then in prop::collection::vec(range(), 0..4)
        ) {
            let mut bitmap = Bitmap::default();
            first.iter().for_each(|(start, count)| bitmap.set(*start, *count));
            let mut saved = bitmap.clone();
            then.iter().for_each(|(start, count)| bitmap.set(*start, *count));
            saved.merge(&bitmap.beyond(&saved));
            prop_assert_eq!(&saved, &bitmap);
            prop_assert_eq!(bitmap.beyond(&saved).count(), 0);
        }
    }

    #[test]
    fn a_bitmap_takes_at_most_a_4096th_of_what_was_written() {
        let mut bitmap = Bitmap::default();
        bitmap.set(0, 3 * CHUNK_SECTORS);
        assert_eq!(bitmap.chunks.len() * size_of::<[u64; WORDS]>(), (3 * CHUNK_SECTORS * 512 / 4096) as usize);
    }

    #[test]
    fn the_last_sector_there_can_be_is_no_overflow() {
        let mut bitmap = Bitmap::default();
        bitmap.set(u64::MAX - 1, 5);
        assert_eq!(bitmap.run(u64::MAX - 1, 9), (true, 1));
    }
}
