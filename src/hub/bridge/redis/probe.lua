-- Sends a hub its probe, behind all live messages so far, and keeps the lease of the one that takes in plain events. It
-- writes, too: a Redis that is full, or may not write for another reason, answers and takes no events.
-- KEYS 1 meta, 2 lease
-- ARGV 1 hub, 2 its probe channel, 3 number, 4 length of the lease in milliseconds
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'head')
local mine, why = '0', ''
if meta[1] then
  local wrote = redis.pcall('HSET', KEYS[1], 'probed', ARGV[3])
  if type(wrote) == 'table' and wrote.err then
    -- Somebody else leads: to be found out and asked.
    if wrote.err:find('READONLY', 1, true) then return wrote end
    why = ' ' .. wrote.err:gsub('%s+', ' ')
  end
end
if why == '' then
  local holder = redis.call('GET', KEYS[2])
  if not holder or holder == ARGV[1] then
    redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[4])
    mine = '1'
  end
end
local place = (meta[1] or '-') .. ' ' .. (meta[2] or '0') .. ' ' .. mine .. why
redis.call('PUBLISH', ARGV[2], 'P ' .. ARGV[3] .. ' ' .. place .. '\n')
return place
