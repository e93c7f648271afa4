//! A compact filter of buyers: "surely not in" or "maybe in", never wrong about who is in.
//!
//! The signal that empties a sale carries one, so that a gateway refuses strangers from memory and asks properly for
//! whoever may already hold or own something: a winner who retries is never told "sold out" (E2).

use sha2::{Digest, Sha256};

/// Ten bits a buyer and four probes: about one stranger in a hundred is asked about in vain.
const BITS_PER_ITEM: usize = 10;
const PROBES: u64 = 4;

/// A Bloom filter with a byte form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    bits: Vec<u8>,
}

impl Filter {
    /// A filter of exactly these.
    pub fn build<'a>(items: impl ExactSizeIterator<Item = &'a str>) -> Self {
        let bytes = (items.len() * BITS_PER_ITEM).div_ceil(8).max(8);
        let mut filter = Self { bits: vec![0; bytes] };
        for item in items {
            for bit in filter.probes(item) {
                filter.bits[bit / 8] |= 1 << (bit % 8);
            }
        }
        filter
    }

    /// Reads the byte form. No bytes: nobody is known, so everybody may be in.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self { bits: bytes.to_vec() }
    }

    /// The byte form.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bits
    }

    /// False only for those who are surely not in.
    pub fn may_contain(&self, item: &str) -> bool {
        self.bits.is_empty() || self.probes(item).all(|bit| self.bits[bit / 8] & (1 << (bit % 8)) != 0)
    }

    /// Two halves of one hash, combined: as good as that many hashes.
    fn probes(&self, item: &str) -> impl Iterator<Item = usize> + use<> {
        let hash = Sha256::digest(item.as_bytes());
        let word = |i: usize| u64::from_le_bytes(hash[i..i + 8].try_into().expect("eight bytes of thirty-two"));
        let (first, second, bits) = (word(0), word(8) | 1, self.bits.len() as u64 * 8);
        (0..PROBES).map(move |i| (first.wrapping_add(i.wrapping_mul(second)) % bits) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_winner_is_in_and_few_strangers() {
        let winners: Vec<String> = (0..1000).map(|i| format!("winner-{i}")).collect();
        let filter = Filter::build(winners.iter().map(String::as_str));
        let filter = Filter::from_bytes(filter.as_bytes());
        assert!(winners.iter().all(|w| filter.may_contain(w)));
        let strangers = (0..10_000).filter(|i| filter.may_contain(&format!("stranger-{i}"))).count();
        assert!(strangers < 300, "{strangers} of 10000 strangers");
    }
}
