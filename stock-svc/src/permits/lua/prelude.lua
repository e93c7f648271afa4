-- One sale's permits, the same functions as domain/permits.rs, line by line.
-- KEYS: header, grants, done, buyers, pending; all of one hash slot by their {sale} tag.
--
-- header:  epoch, phase (O open, R rebuilding), free, granted, snapshot, version, server,
--          facts, verb (O, P, C), start, stop, limit, total, sold
-- grants:  hold -> epoch|quantity|at|buyer
-- done:    hold -> p (permit refunded) or r (hold released)
-- buyers:  buyer -> units|last hold
-- pending: hold by the time of its grant
local HEADER, GRANTS, DONE, BUYERS, PENDING = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]

-- Lua's own formatting would turn large numbers into floating point.
local function int(n) return string.format('%.0f', n) end

local function get(field) return redis.call('HGET', HEADER, field) end

local function set(field, value) redis.call('HSET', HEADER, field, value) end

local function number(field) return tonumber(get(field)) end

local function is_open() return get('phase') == 'O' end

local function is_claimed(epoch) return get('phase') == 'R' and get('epoch') == epoch end

local function parse_grant(text)
  local epoch, quantity, at, buyer = string.match(text, '^(%d+)|(%d+)|(%d+)|(.*)$')
  return { epoch = epoch, quantity = tonumber(quantity), at = at, buyer = buyer }
end

local function parse_bought(text)
  local units, last = string.match(text, '^(%d+)|(.*)$')
  return tonumber(units), last
end

local function count_in(buyer, quantity, hold)
  local bought = redis.call('HGET', BUYERS, buyer)
  local units = bought and parse_bought(bought) or 0
  redis.call('HSET', BUYERS, buyer, int(units + quantity) .. '|' .. hold)
end

local function count_out(buyer, quantity, hold)
  local bought = redis.call('HGET', BUYERS, buyer)
  if not bought then return end
  local units, last = parse_bought(bought)
  units = units - quantity
  if units <= 0 then
    redis.call('HDEL', BUYERS, buyer)
    return
  end
  if last == hold then last = '' end
  redis.call('HSET', BUYERS, buyer, int(units) .. '|' .. last)
end

local function unlist(hold)
  redis.call('HDEL', GRANTS, hold)
  redis.call('ZREM', PENDING, hold)
end

-- Newer facts replace older ones; `sold` only grows.
local function update_facts(version, verb, start, stop, limit, total, sold)
  sold = math.max(tonumber(sold), number('sold') or 0)
  if tonumber(version) > (number('facts') or -1) then
    redis.call('HSET', HEADER, 'facts', version, 'verb', verb, 'start', start, 'stop', stop,
      'limit', limit, 'total', total)
  end
  set('sold', int(sold))
end

