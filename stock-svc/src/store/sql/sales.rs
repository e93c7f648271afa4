//! Sales as they are read: their stock each time, everything else only where its version is not known yet.
//!
//! A batch over a thousand sales locks a thousand rows, and the guard reads all of them four times a second. What it is
//! for is the stock; the terms, the texts and the verb make up two thirds of a row and change with the version alone.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use mesh::sql;
use proto::{Error, SaleId};
use sea_orm::{DatabaseTransaction, QueryOrder, QuerySelect, Select, prelude::*};

use super::{record_of, stock_sale};
use crate::{
    domain::{ledger::Ledger, sale::Sale},
    store::Record,
};

/// The version, and the columns of [`Ledger`].
type StockRow = (String, i64, i64, i64, i64, i64, i64, i64, i64, i64);

/// Reads sales. Cheap to clone; clones know the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Sales(Arc<Mutex<HashMap<SaleId, Arc<Sale>>>>);

impl Sales {
    /// The selected sales, in no order.
    pub(super) async fn read(
        &self,
        on: &impl ConnectionTrait,
        select: Select<stock_sale::Entity>,
    ) -> Result<Vec<Record>, sql::Error> {
        use stock_sale::Column;
        let columns = [
            Column::SaleId,
            Column::Version,
            Column::Available,
            Column::Held,
            Column::Sold,
            Column::Total,
            Column::Persisted,
            Column::Epoch,
            Column::NextEpoch,
            Column::ReleaseSeq,
        ];
        let rows: Vec<StockRow> = select.select_only().columns(columns).into_tuple().all(on).await?;
        let mut records = Vec::with_capacity(rows.len());
        let mut unknown = Vec::new();
        for (id, version, available, held, sold, total, persisted, epoch, next_epoch, release_seq) in rows {
            let id = SaleId::parse("sale", &id)?;
            match self.known().get(&id).filter(|sale| sale.version == version).cloned() {
                Some(sale) => {
                    let ledger = Ledger { available, held, sold, total, persisted, epoch, next_epoch, release_seq };
                    records.push(Record { sale, ledger });
                }
                None => unknown.push(id),
            }
        }
        for chunk in sql::key_chunks(&unknown) {
            let these = Column::SaleId.is_in(chunk.iter().map(SaleId::as_str));
            for row in stock_sale::Entity::find().filter(these).all(on).await? {
                let record = record_of(row)?;
                self.known().insert(record.sale.id.clone(), record.sale.clone());
                records.push(record);
            }
        }
        Ok(records)
    }

    /// Locks rows, in order of their ids.
    pub(super) async fn lock(
        &self,
        tx: &DatabaseTransaction,
        ids: &BTreeSet<&SaleId>,
    ) -> Result<BTreeMap<SaleId, Record>, sql::Error> {
        let ids: Vec<&SaleId> = ids.iter().copied().collect();
        let mut records = BTreeMap::new();
        for chunk in sql::key_chunks(&ids) {
            let select = stock_sale::Entity::find()
                .filter(stock_sale::Column::SaleId.is_in(chunk.iter().map(|id| id.as_str())))
                .order_by_asc(stock_sale::Column::SaleId)
                .lock_exclusive();
            records.extend(self.read(tx, select).await?.into_iter().map(|record| (record.sale.id.clone(), record)));
        }
        Ok(records)
    }

    pub(super) async fn lock_one(&self, tx: &DatabaseTransaction, sale: &SaleId) -> Result<Record, sql::Error> {
        let mut records = self.lock(tx, &BTreeSet::from([sale])).await?;
        Ok(records.remove(sale).ok_or_else(|| Error::not_found("sale"))?)
    }

    /// Forgets all others.
    pub(super) fn keep_only(&self, records: &[Record]) {
        let ids: HashSet<&SaleId> = records.iter().map(|record| &record.sale.id).collect();
        self.known().retain(|id, _| ids.contains(id));
    }

    fn known(&self) -> MutexGuard<'_, HashMap<SaleId, Arc<Sale>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
