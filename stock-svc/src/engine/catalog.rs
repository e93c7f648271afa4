//! The sales in memory, so that taking permits asks no database. A sale's price, window and limit never change; its
//! verb and stock are hints here, refreshed by the guard: the permits' header decides.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    sync::{PoisonError, RwLock},
};

use proto::SaleId;

use crate::store::Record;

#[derive(Debug, Default)]
pub(crate) struct Catalog(RwLock<HashMap<SaleId, Record>>);

impl Catalog {
    pub(crate) fn get(&self, id: &SaleId) -> Option<Record> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    pub(crate) fn live(&self, now: i64) -> Vec<Record> {
        let records = self.0.read().unwrap_or_else(PoisonError::into_inner);
        records.values().filter(|record| record.sale.is_live(now)).cloned().collect()
    }

    /// Takes over a record that was just read or written, unless a later verb is known.
    pub(crate) fn put(&self, record: Record) {
        put(&mut self.0.write().unwrap_or_else(PoisonError::into_inner), record);
    }

    /// Knows these and forgets all others, which it answers.
    pub(crate) fn refresh(&self, records: Vec<Record>) -> Vec<Record> {
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let ids: HashSet<SaleId> = records.iter().map(|record| record.sale.id.clone()).collect();
        let forgotten = known.extract_if(|id, _| !ids.contains(id)).map(|(_, record)| record).collect();
        for record in records {
            put(&mut known, record);
        }
        forgotten
    }
}

fn put(known: &mut HashMap<SaleId, Record>, record: Record) {
    match known.entry(record.sale.id.clone()) {
        Entry::Occupied(known) if known.get().sale.version > record.sale.version => {}
        Entry::Occupied(mut known) => *known.get_mut() = record,
        Entry::Vacant(empty) => drop(empty.insert(record)),
    }
}
